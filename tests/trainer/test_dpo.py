"""DPO: losses, a reference asked once or every time, runs on any number of processes, flags."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import curve, write_jsonl
from running import run_script
from stage_runs import pair_runs, same_bits, same_metrics

from dataset.preference_dataset import PreferenceDataset
from model.lm import LMConfig, MiniMindLM
from model.preference_loss import METRICS, answer_logps, logps_of
from trainer.train_dpo import check_loss, dpo_loss, ipo_loss, preference_loss, simpo_loss

FLAGS = {
    "loss_type": "sigmoid",
    "beta": None,
    "label_smoothing": 0.0,
    "simpo_gamma": 1.0,
    "sft_weight": 0.0,
}
KINDS = ("sigmoid", "ipo", "simpo")


def choose_loss(flags: dict):
    """The loss that flags describe: (policy, lens, reference) -> METRICS summed over the pairs."""
    args = SimpleNamespace(**flags)
    check_loss(args)
    return functools.partial(preference_loss, args)


def numbers(*shape: int) -> torch.Tensor:
    return -20 * torch.rand(*shape)


def test_dpo_by_hand():
    """Beta 0.5, log-ratios 2 and -1: the margin is 1.5."""
    policy, reference = torch.tensor([[-3.0, -7.0]]), torch.tensor([[-5.0, -6.0]])
    losses, chosen, rejected = dpo_loss(policy, reference, 0.5, 0.0)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)
    assert (chosen.item(), rejected.item()) == (1.0, -0.5)
    smoothed = dpo_loss(policy, reference, 0.5, 0.1)[0].item()
    assert smoothed == pytest.approx(
        0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5)), rel=1e-6
    )
    lens = torch.tensor([[4.0, 2.0]])
    assert ipo_loss(policy, reference, lens, 0.5)[0].item() == pytest.approx(
        (2 / 4 + 1 / 2 - 1) ** 2
    )
    losses, chosen, rejected = simpo_loss(policy, lens, 2.0, 0.3, 0.0)
    assert (chosen.item(), rejected.item()) == (-1.5, -7.0)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-(5.5 - 0.3))), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_a_pair_negates_its_margin(kind):
    loss_of, policy, reference = (
        choose_loss(FLAGS | {"loss_type": kind}),
        numbers(1, 2),
        numbers(1, 2),
    )
    lens = torch.tensor([[7.0, 3.0]])
    ours = dict(zip(METRICS, loss_of(policy, lens, reference).tolist(), strict=True))
    swapped = dict(
        zip(METRICS, loss_of(policy.flip(1), lens.flip(1), reference.flip(1)).tolist(), strict=True)
    )
    assert swapped["margin"] == -ours["margin"] != 0 and swapped["accuracy"] == 1 - ours["accuracy"]
    assert (swapped["chosen_reward"], swapped["rejected_reward"]) == (
        ours["rejected_reward"],
        ours["chosen_reward"],
    )


def test_the_term_of_sft():
    policy, lens = numbers(5, 2), torch.randint(1, 9, (5, 2)).float()
    with_sft, without = (
        choose_loss(FLAGS | {"sft_weight": w})(policy, lens, numbers(5, 2) * 0) for w in (0.5, 0.0)
    )
    assert (with_sft - without)[0].item() == pytest.approx(
        -0.5 * (policy[:, 0] / lens[:, 0]).sum().item(), rel=1e-5
    )
    assert torch.equal(with_sft[1:], without[1:])


BAD_FLAGS = {
    "--beta 0": {"beta": 0.0},
    "--beta -1": {"beta": -1.0},
    "--label_smoothing 0.5": {"label_smoothing": 0.5},
    "--label_smoothing -0.1": {"label_smoothing": -0.1},
    "--label_smoothing 0.1: ipo has none": {"label_smoothing": 0.1, "loss_type": "ipo"},
    "--sft_weight -1": {"sft_weight": -1.0},
}


@pytest.mark.parametrize("reason", BAD_FLAGS)
def test_bad_flags(reason):
    with pytest.raises(ValueError, match=reason):
        choose_loss(FLAGS | BAD_FLAGS[reason])


@pytest.fixture(scope="module")
def model() -> MiniMindLM:
    torch.manual_seed(1)
    return MiniMindLM(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2)).eval()


@pytest.fixture
def pairs(tokenizer, tmp_path) -> PreferenceDataset:
    rows = [
        {"prompt": f"{n}?", "chosen": "yes " * (1 + n % 5), "rejected": "no " * (2 + n % 3)}
        for n in range(6)
    ]
    return PreferenceDataset(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer, 64, tmp_path)


@torch.no_grad()
def test_log_probabilities_of_answers(model, pairs):
    """Those of each answer alone, its tokens with the end of turn summed, in whatever row."""
    batch = pairs.collate([pairs[row] for row in range(6)])
    logps, lens, _ = logps_of(model, *batch, "cpu")
    for row in range(6):
        for n, (X, Y, mask) in enumerate(pairs[row]):
            each = (
                model(X.view(1, -1)).logits[0].log_softmax(-1).gather(1, Y.view(-1, 1))[mask.bool()]
            )
            assert logps[row, n].item() == pytest.approx(each.sum().item(), rel=1e-6) and lens[
                row, n
            ] == len(each)
    one = logps_of(model, *pairs.collate([pairs[3]]), "cpu")[0]
    assert torch.equal(one, logps[3:4])


@torch.no_grad()
def test_an_identical_pair_has_margin_zero(model, pairs):
    """Wherever its two sides stand, whatever the reference says about them."""
    (chosen, _), neighbour = pairs[4], pairs[1]
    batch = pairs.collate([neighbour, (chosen, chosen)])
    policy, lens, _ = logps_of(model, *batch, "cpu")
    other = MiniMindLM(LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2)).eval()
    reference = logps_of(other, *batch, "cpu")[0]
    for kind in KINDS:
        sums = choose_loss(FLAGS | {"loss_type": kind})(policy[1:], lens[1:], reference[1:])
        assert dict(zip(METRICS, sums.tolist(), strict=True))["margin"] == 0.0


def test_a_batch_without_pairs_has_gradients(model, pairs):
    policy, lens, _ = logps_of(model, *pairs.collate([]), "cpu")
    choose_loss(FLAGS)(policy, lens, torch.zeros(0, 2))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_answer_logps_sums_each_answer():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 1, 1]])
    logps, lens = answer_logps(torch.arange(1.0, 8.0), mask, [3, 2, 3, 2])
    assert logps.tolist() == [[-3, -3], [-9, -13]] and lens.tolist() == [[2, 1], [2, 2]]


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

STEPS = 20


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return pair_runs(
        "dpo", tmp_path_factory.mktemp("dpo"), STEPS, "--learning_rate=3e-4", "--dropout=0.1"
    )


@pytest.fixture(scope="module")
def alone(train):
    return train("alone", "--use_moe=1", "--save_total_limit=9")


def test_it_learns_and_logs(alone):
    """The first loss is ln 2 although dropout was asked for."""
    lines = curve(alone)
    first, last, evaluation = lines[0], lines[-2], lines[-1]
    assert (
        first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        and first["margin"] == first["chosen_reward"] == 0
    )
    assert last["step"] == STEPS and last["loss"] < 0.6 and last["accuracy"] > 0.9
    assert last["margin"] == pytest.approx(
        last["chosen_reward"] - last["rejected_reward"], abs=1e-6
    )
    assert evaluation["eval_accuracy"] > 0.9 and evaluation["eval_margin"] > 0
    needed = (
        "epoch loss aux_loss lr grad_norm tokens supervised_tokens tokens_per_sec accuracy margin"
        " pairs"
    )
    assert set(needed.split()) <= first.keys()
    assert json.loads(alone.with_suffix(".json").read_text())["dropout"] == 0.0


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_train_as_one(train, alone, strategy):
    cached = (
        ["--cache_reference=1"] if strategy == "zero3" else []
    )  # its pairs are shared by the ranks
    run = train(strategy, "--use_moe=1", f"--strategy={strategy}", *cached, nproc=2)
    same_metrics(run, alone, rel=1e-5, abs=2e-6)
    right = [line["accuracy"] * line["pairs"] for line in curve(run) if "pairs" in line]
    assert right == pytest.approx([round(count) for count in right], abs=1e-9)
    ours, wanted = (torch.load(f"{path}.pth") for path in (run, alone))
    for name, value in ours.items():
        assert (value - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_a_cached_reference_gives_the_same_losses(train, alone):
    run = train("cached", "--use_moe=1", "--cache_reference=1")
    same_metrics(run, alone, rel=1e-6, abs=2e-6)
    kept = list((train.folder / "cache").glob("reference_*.npz"))
    before = kept[0].stat().st_mtime_ns
    train("again", "--use_moe=1", "--cache_reference=1", "--max_steps=1")
    assert len(kept) == 1 and kept[0].stat().st_mtime_ns == before, (
        "asked again although the answers were kept"
    )
    content = bytearray(kept[0].read_bytes())
    content[len(content) // 2] ^= 4
    kept[0].write_bytes(content)
    altered = train("altered", "--use_moe=1", "--cache_reference=1")
    assert (
        train.printed.count(
            f"{kept[0]} is damaged (Bad CRC-32 for file 'logps.npy'): it is computed again"
        )
        == 1
    )
    same_metrics(altered, run, rel=0, abs=0)


def test_three_resumes_change_nothing(train, alone):
    """The second and third one go on from what the resume before them has saved."""
    source = alone
    for step in (5, 10, 15):
        place = source / "checkpoints" / f"step_{step:08d}"
        source = train("resumed", "--use_moe=1", "--save_total_limit=9", f"--resume={place}")
    same_bits(source, alone, first=5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(train, dtype):
    lines = curve(train(dtype, f"--dtype={dtype}", "--max_steps=8"))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(
        math.isfinite(line[name])
        for line in lines
        if "loss" in line
        for name in ("loss", "grad_norm")
    )
    assert lines[7]["loss"] < lines[0]["loss"]
    assert "--dropout 0.1: left out" in train.printed


@pytest.mark.parametrize("kind", ["ipo", "simpo"])
def test_other_losses_learn(train, kind):
    lines = curve(train(kind, f"--loss_type={kind}", "--sft_weight=0.1"))
    assert lines[-2]["loss"] < 0.9 * lines[0]["loss"] and lines[-1]["eval_accuracy"] > 0.8


def test_a_run_goes_on_with_its_own_reference_only(train, alone, tmp_path):
    """Other weights under --from_weight would be another reference: one line, and exit code 2."""
    place = alone / "checkpoints" / "step_00000005"
    weights = f"--from_weight={alone}.pth"
    done = run_script("trainer/train_dpo.py", *train.flags, "--use_moe=1", f"--resume={place}", weights,
                      f"--out_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "this is another run: the weights of --from_weight was" in done.stderr
