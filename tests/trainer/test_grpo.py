"""GRPO: advantages, losses, the KL term, and runs that do not depend on how they are spread."""

import math
import shutil

import pytest
import torch
from conftest import curve
from running import run_script
from stage_runs import prompt_runs, same_bits, same_rollouts

from runtime.saving import rotation, validity
from trainer import train_grpo as grpo

FLAGS = (
    "--dim=32 --n_layers=2 --n_heads=4 --n_kv_heads=2 --device=cpu --max_seq_len=64"
    " --max_new_tokens=12"
)
FLAGS += (
    " --group_size=4 --batch_size=3 --global_batch_size=6 --epochs=9 --max_steps=12"
    " --learning_rate=2e-3"
)
FLAGS = (
    FLAGS
    + " --log_interval=1 --from_weight=none --warmup_ratio=0 --replica_check=1 --save_interval=4"
).split()
TWO_PASSES = "--updates_per_rollout=2 --mini_batches=2 --kl_beta=0.05".split()


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return prompt_runs("grpo", tmp_path_factory.mktemp("grpo"), FLAGS, 13)


# --------------------------------------------------------------------------------------------------
# The maths
# --------------------------------------------------------------------------------------------------


def test_advantages():
    scores = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    found = grpo.group_advantages(scores, "grpo")
    assert found[0].tolist() == pytest.approx([0.8659, -0.8659, -0.8659, 0.8659], abs=1e-4)
    assert found.sum(dim=1).abs().max() < 1e-6 and grpo.group_advantages(2 * scores, "dapo")[
        1, 0
    ] == pytest.approx(found[1, 0].item(), abs=1e-3)
    assert grpo.group_advantages(scores, "dr_grpo")[1].tolist() == [1.5, -0.5, -0.5, -0.5]


LENGTHS = torch.tensor([2, 3, 1])
OF = torch.arange(3).repeat_interleave(LENGTHS)


def terms_of(loss_type, low, high, seed=0):
    torch.manual_seed(seed)
    old = -torch.rand(6) * 3
    log_probs = (old + torch.randn(6) * 0.5).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5])
    return (
        old,
        log_probs,
        advantages,
        grpo.policy_terms(log_probs, old, advantages, OF, LENGTHS, loss_type, low, high),
    )


@pytest.mark.parametrize("loss_type", grpo.CLIPS)
def test_the_first_update_is_the_policy_gradient(loss_type):
    """Where the policy is the old one nothing is clipped: -advantage x grad log p."""
    log_probs = (-torch.rand(6)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5])
    given = (log_probs.detach(), advantages, OF, LENGTHS, loss_type, *grpo.CLIPS[loss_type])
    terms, below, above = grpo.policy_terms(log_probs, *given)
    weights = grpo.token_weights(OF, LENGTHS, 3, 6, loss_type, 10)
    (terms * weights).sum().backward()
    share = {
        "grpo": 1 / (3 * LENGTHS),
        "gspo": 1 / (3 * LENGTHS),
        "dr_grpo": torch.full((3,), 1 / 30),
    }
    expected = -(advantages * share.get(loss_type, torch.full((3,), 1 / 6)))[OF]
    assert not below.any() and not above.any()
    torch.testing.assert_close(log_probs.grad, expected, atol=1e-6, rtol=0)


def test_clipped_tokens_have_no_gradient_but_cispo_keeps_theirs():
    for loss_type in ("grpo", "cispo"):
        old, log_probs, advantages, (terms, below, above) = terms_of(loss_type, 0.2, 0.2)
        ratio, advantage = (log_probs - old).detach().exp(), advantages[OF]
        assert below.tolist() == ((ratio < 0.8) & (advantage < 0)).tolist()
        assert (
            above.tolist() == ((ratio > 1.2) & (advantage > 0)).tolist() and (below | above).any()
        )
        terms.sum().backward()
        clipped = ratio.clamp(0.8, 1.2)
        wanted = -advantage * (clipped if loss_type == "cispo" else ratio * ~(below | above))
        torch.testing.assert_close(log_probs.grad, wanted)


def test_gspo_has_one_ratio_for_a_completion():
    old, log_probs, advantages, (terms, _, _) = terms_of("gspo", 10.0, 10.0)
    ratio = torch.stack([(log_probs - old)[OF == n].mean().exp() for n in range(3)])
    torch.testing.assert_close(terms, (-ratio * advantages)[OF])


def test_the_gradient_of_the_kl_term_is_that_of_the_divergence():
    """Exactly, over all tokens of a vocabulary of five; tokens are drawn from an older policy."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    old, reference = (torch.randn(5, dtype=torch.float64).log_softmax(0) for _ in range(2))
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad(
        (policy.exp() * (policy - reference)).sum(), logits, retain_graph=True
    )
    (ours,) = torch.autograd.grad(
        (old.exp() * grpo.kl_terms(policy, old, reference)).sum(), logits, retain_graph=True
    )
    assert (ours - exact).abs().max() < 1e-5 < exact.abs().max()
    usual = (
        (reference - policy).exp() - 1 - (reference - policy)
    )  # k3, on tokens of the policy itself
    (wrong,) = torch.autograd.grad((policy.detach().exp() * usual).sum(), logits)
    assert (wrong - exact).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def test_the_run_logs_what_it_did(train):
    lines = [line for line in curve(train.one()) if "loss" in line]
    assert len(lines) == 12 and lines[-1]["reward"] > lines[0]["reward"]
    for line in lines:
        assert (
            line["ratio"] == pytest.approx(1, abs=1e-6)
            and line["clipped_low"] == line["clipped_high"] == 0
        )
        assert 0 < line["entropy"] < math.log(6400) + 1e-3 and line["kl"] == 0
        assert 0 <= line["groups_without_variance"] < 1 and 0 <= line["truncated"] <= 1
        assert 1 <= line["completion_length"] <= 12 and line["reward_std"] > 0
    log = (train.one() / "training.log").read_text()
    assert "reward" in log and "<|im_start|>assistant" in log  # a sample of the rollouts


@pytest.mark.parametrize(
    "nproc, flags",
    [
        (2, "--strategy=ddp"),
        (2, "--strategy=zero3 --use_moe=1"),
        (3, "--strategy=zero1 --batch_size=1"),
    ],
    ids=["ddp", "zero3 moe", "zero1 x 3"],
)
def test_ranks_follow_the_curve_of_one_process(train, nproc, flags):
    moe = ["--use_moe=1"] if "moe" in flags else []
    reference = train.one(*TWO_PASSES, *moe, name="moe" if moe else "two passes")
    run = train(flags.split()[0] + str(nproc), *TWO_PASSES, *flags.split(), nproc=nproc)
    same_rollouts(run, reference)
    first = curve(run)[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and any(
        line["kl"] > 1e-4 for line in curve(run)
    )
    weights, wanted = (torch.load(f"{path}.pth", weights_only=True) for path in (run, reference))
    assert all(
        (value - wanted[name]).norm() <= 1e-4 * wanted[name].norm()
        for name, value in weights.items()
    )


def test_three_resumes_are_bit_identical(train):
    flags = [
        *TWO_PASSES,
        "--dropout=0.1",
        "--max_steps=16",
        "--save_total_limit=9",
        "--eval_ratio=0.2",
    ]
    whole = train("whole", *flags)
    run = shutil.copytree(whole.parent, train.folder / "resumed") / whole.name
    for step in (4, 8, 12):  # as if the run had been killed behind each of these
        for newer in rotation.list_checkpoints(run / "checkpoints"):
            if int(newer.name[5:]) > step:
                rotation.remove(newer)
        train("resumed", *flags, "--resume=auto")
        same_bits(run, whole)


def test_bfloat16_is_finite_and_every_loss_runs(train):
    for loss_type in ("dr_grpo", "dapo", "cispo", "gspo"):
        flags = [*TWO_PASSES, f"--loss_type={loss_type}", "--dtype=bfloat16", "--max_steps=4"]
        lines = [line for line in curve(train(loss_type, *flags)) if "loss" in line]
        assert len(lines) == 4 and all(
            math.isfinite(line["loss"] + line["grad_norm"]) for line in lines
        )
        assert all(line["grad_norm"] > 0 for line in lines)


def test_killed_during_a_rollout(train):
    """A kill -9 while the third rollout is scored: the run goes on to the same end."""
    flags = [*train.flags, f"--out_dir={train.folder / 'killed'}", *TWO_PASSES]
    killed = run_script("trainer/train_grpo.py", *flags, env={"KILLED_AT_CALL": "3"})
    assert killed.returncode == -9
    saved = rotation.list_checkpoints(train.folder / "killed/grpo_32/checkpoints")
    assert saved and validity.fault(saved[-1]) == ""
    same_bits(
        train("killed", *TWO_PASSES, "--resume=auto"), train.one(*TWO_PASSES, name="two passes")
    )


def test_a_group_of_one_is_refused(train):
    done = run_script(
        "trainer/train_grpo.py", *train.flags, "--group_size=1", f"--out_dir={train.folder / 'bad'}"
    )
    assert (done.returncode, done.stderr.count("\n")) == (
        2,
        1,
    ) and "--group_size 1: must be 2 or more" in done.stderr


def test_a_broken_reward_ends_the_run_on_all_ranks(train):
    reward, out = f"--reward={train.folder / 'reward.py'}:broken", train.folder / "broken"
    done = run_script(
        "trainer/train_grpo.py", *train.flags, reward, f"--out_dir={out}", "--ddp", nproc=2
    )
    assert done.returncode == 1  # torchrun's; the ranks ended with 2
    assert "broken returned nan at" in done.stderr and "exitcode  : 2" in done.stderr
    assert not list(out.glob("*.pth"))
