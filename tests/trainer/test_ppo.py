"""PPO: rewards, advantages, losses, and runs that do not depend on how they are spread."""

import math
import shutil

import pytest
import torch
from conftest import checkpoint_tensors, curve
from running import run_script
from stage_runs import prompt_runs, same_bits, same_rollouts

from model.lm import LMConfig
from model.reward import RewardConfig, RewardModel
from model.weights import load_model
from runtime.checkpoint import save_file
from runtime.rl import rollout
from runtime.saving import rotation, validity
from trainer import train_ppo as ppo

FLAGS = (
    "--dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --device=cpu --max_seq_len=64"
    " --max_new_tokens=12"
)
FLAGS += (
    " --batch_size=6 --global_batch_size=12 --epochs=20 --max_steps=12 --learning_rate=2e-3"
    " --log_interval=1"
)
FLAGS += (
    " --from_weight=none --warmup_ratio=0 --replica_check=1 --save_interval=4 --ppo_epochs=2"
    " --mini_batches=2"
)
FLAGS = FLAGS.split()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return prompt_runs("ppo", tmp_path_factory.mktemp("ppo"), FLAGS, 25)


# --------------------------------------------------------------------------------------------------
# The maths
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sum_of_equation_16(gamma, lam):
    lengths = torch.tensor([7, 1, 4, 9])
    rewards, values = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    found = ppo.estimate_advantages(rewards, values, lengths, gamma, lam)
    for row, n in enumerate(lengths.tolist()):
        v = [*values[row, :n].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            direct = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            assert found[row, t].item() == pytest.approx(direct, abs=1e-12)
        assert found[row, n:].abs().sum() == 0


def test_lambda_one_is_return_less_value():
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    found = ppo.estimate_advantages(rewards, values, torch.tensor([5, 5]), 1.0, 1.0)
    torch.testing.assert_close(found, rewards.flip(1).cumsum(1).flip(1) - values)


def test_token_rewards():
    log_probs, reference = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -3.0]]), torch.zeros(2, 3)
    found = ppo.token_rewards(
        torch.tensor([5.0, 7.0]), log_probs, reference, torch.tensor([2, 3]), 0.1
    )
    torch.testing.assert_close(found, torch.tensor([[0.1, 5.2, 0.0], [0.1, 0.1, 7.3]]))


def test_the_tokens_of_packs_have_each_their_place():
    completions = [[5] * n for n in (3, 1, 4, 2, 4)]
    sampled = rollout.Rollout([[9, 9]] * 5, completions, [True] * 5)
    padded, again = torch.rand(5, 6), torch.zeros(5, 6)
    for pack in [*rollout.packs_of(sampled, [4, 0, 1, 3], 8), rollout.pack(sampled, [])]:
        places = ppo.places_of(pack)
        assert padded[places].shape == pack.targets.shape
        again[places] = padded[places]
    inside = torch.arange(6) < torch.tensor([3, 1, 0, 2, 4]).unsqueeze(1)
    assert torch.equal(again, padded * inside)


def test_whitening():
    advantages, lengths = torch.randn(6, 8) * 3 + 2, torch.tensor([8, 1, 3, 5, 8, 2])
    found = ppo.whiten(advantages, lengths)
    inside = torch.arange(8) < lengths.unsqueeze(1)
    assert found[inside].mean().abs() < 1e-6 and found[inside].std(correction=0) == pytest.approx(
        1, abs=1e-6
    )
    assert (found[~inside] == 0).all()
    assert (ppo.whiten(torch.ones(2, 3), torch.tensor([3, 2])) == 0).all()


def test_clipped_losses():
    old, advantages = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_probs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    terms, clipped = ppo.clipped_terms(log_probs, old, advantages, 0.2)
    assert terms.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8]) and clipped.tolist() == [
        True,
        False,
        False,
        True,
    ]
    terms.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0, -0.5, 1.5, 0])
    values = torch.tensor([0.5, 0.1, -0.5]).requires_grad_()
    terms, clipped = ppo.value_terms(values, torch.zeros(3), torch.ones(3), 0.2)
    assert terms.tolist() == pytest.approx([0.32, 0.405, 1.125]) and clipped.tolist() == [
        True,
        False,
        False,
    ]
    terms.sum().backward()
    assert values.grad.tolist() == pytest.approx([0, -0.9, -1.5])


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def same_ppo_curve(run, reference):
    same_rollouts(run, reference)
    for line, wanted in zip(curve(run), curve(reference), strict=True):
        for key in ("policy_loss", "value_loss", "clipped", "value_clipped"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-5), (line["step"], key)


def test_the_run_logs_what_it_did_and_leaves_a_language_model(train):
    lines = curve(train.one())
    assert len(lines) == 12
    assert (
        lines[0]["ratio"] == pytest.approx(1, abs=1e-6)
        and lines[0]["clipped"] == lines[0]["kl"] == 0
    )
    assert any(line["kl"] != 0 for line in lines) and all(
        line["value_loss"] > 0 for line in lines[:8]
    )
    actor = load_model(train.one().with_suffix(".pth"))
    tensors = checkpoint_tensors(rotation.list_checkpoints(train.one() / "checkpoints")[0])
    assert any(name.startswith("model.critic.") for name in tensors)
    for name, value in actor.named_parameters():
        assert torch.equal(value, tensors[f"model.actor.{name}"])


@pytest.mark.parametrize(
    "nproc, flags",
    [
        (2, "--strategy=ddp"),
        (2, "--strategy=zero3 --use_moe=1"),
        (3, "--strategy=zero2 --batch_size=2"),
    ],
    ids=["ddp", "zero3 moe", "zero2 x 3"],
)
def test_ranks_follow_the_curve_of_one_process(train, nproc, flags):
    moe = ["--use_moe=1"] if "moe" in flags else []
    reference = train.one(*moe, name="moe" if moe else "one")
    run = train(flags.split()[0] + str(nproc), *flags.split(), nproc=nproc)
    same_ppo_curve(run, reference)
    weights, wanted = (torch.load(f"{path}.pth", weights_only=True) for path in (run, reference))
    assert weights.keys() == wanted.keys()
    assert all(
        (value - wanted[name]).norm() <= 1e-4 * wanted[name].norm()
        for name, value in weights.items()
    )


def test_three_resumes_are_bit_identical(train):
    flags = [
        "--dropout=0.1",
        "--max_steps=16",
        "--save_total_limit=9",
        "--eval_ratio=0.1",
        "--optimizer=muon",
    ]
    whole = train("whole", *flags)
    run = shutil.copytree(whole.parent, train.folder / "resumed") / whole.name
    for step in (4, 8, 12):  # as if the run had been killed behind each of these
        for newer in rotation.list_checkpoints(run / "checkpoints"):
            if int(newer.name[5:]) > step:
                rotation.remove(newer)
        train("resumed", *flags, "--resume=auto")
        same_bits(run, whole)


def test_killed_during_a_rollout(train):
    flags = [*train.flags, f"--out_dir={train.folder / 'killed'}"]
    killed = run_script("trainer/train_ppo.py", *flags, env={"KILLED_AT_CALL": "3"})
    assert killed.returncode == -9
    saved = rotation.list_checkpoints(train.folder / "killed/ppo_32/checkpoints")
    assert saved and validity.fault(saved[-1]) == ""
    same_bits(train("killed", "--resume=auto"), train.one())


def test_a_reward_model_judges_and_starts_the_critic(train):
    """In bfloat16, with a second reward beside it."""
    shape = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 6400,
        "max_seq_len": 64,
    }
    model, path = RewardModel(RewardConfig(**shape)), train.folder / "reward_32.pth"
    torch.nn.init.normal_(model.score.weight)
    save_file(path, model.state_dict())
    save_file(path.with_suffix(".json"), model.config.to_json())
    flags = [
        f"--critic_weight={path}",
        "--dtype=bfloat16",
        "--max_steps=4",
        "--reward",
        f"{path}:0.5",
    ]
    run = train("judged", *flags, f"{train.folder / 'reward.py'}:letters")
    lines = curve(run)
    assert len(lines) == 4 and all(
        math.isfinite(line["loss"] + line["grad_norm"]) for line in lines
    )
    parts = [value for key, value in lines[0].items() if key.startswith("reward ")]
    assert len(parts) == 2 and sum(parts) == pytest.approx(lines[0]["reward"])
    save_file(path.with_suffix(".json"), LMConfig(**shape).to_json())
    bad = run_script(
        "trainer/train_ppo.py",
        *train.flags,
        f"--reward={path}",
        f"--out_dir={train.folder / 'bad'}",
    )
    assert (
        bad.returncode == 2
        and bad.stderr.count("\n") == 1
        and "a language model, not a reward model" in bad.stderr
    )
