"""One curve: gradient and loss do not depend on how a global batch is split, packed or padded."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, checkpoint_tensors, curve

from dataset.lm_dataset import SFTDataset
from model.lm import LMConfig, MiniMindLM
from model.weights import load_weights

BETA1 = 0.9


@pytest.fixture(scope="module")
def start(job):
    """Start weights, dense and MoE, where every parameter has a gradient."""
    paths = {}
    for use_moe in (0, 1):
        torch.manual_seed(use_moe)
        model = MiniMindLM(LMConfig(**SIZES, max_seq_len=128, use_moe=bool(use_moe)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
        paths[use_moe] = job.folder / f"start_{use_moe}.pth"
        torch.save(model.state_dict(), paths[use_moe])
    return paths


def gradients(run) -> list[torch.Tensor]:
    """The gradient of a run's only step: Adam's first moment is (1 - beta1) times that."""
    tensors = checkpoint_tensors(run / "checkpoints/step_00000001")
    return [
        value / (1 - BETA1) for name, value in sorted(tensors.items()) if name.endswith(".exp_avg")
    ]


def relative_error(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Largest over the parameters of |difference| / |reference|, both as norms."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, reference, strict=True))


def padded_gradients(weights, use_moe: int, dataset, alpha: float) -> list[torch.Tensor]:
    """The textbook step: padded rows, logits everywhere, mean over supervised tokens."""
    config = LMConfig(**SIZES, max_seq_len=128, use_moe=bool(use_moe), aux_loss_alpha=alpha)
    model = MiniMindLM(config)
    load_weights(model, weights)
    samples = [dataset[row] for row in range(len(dataset))]
    longest = max(len(sample[0]) for sample in samples)
    X, Y, loss_mask = (
        torch.stack([F.pad(s[n], (0, longest - len(s[n]))) for s in samples]) for n in range(3)
    )
    real = torch.stack([F.pad(torch.ones_like(s[0]), (0, longest - len(s[0]))) for s in samples])
    out = model(X, attention_mask=real)
    losses = F.cross_entropy(out.logits.flatten(0, 1), Y.flatten(), reduction="none")
    loss = (losses * loss_mask.flatten()).sum() / loss_mask.sum()
    (loss + out.aux_loss).backward()
    return [
        p.grad
        for _, p in sorted(
            model.named_parameters(), key=lambda named: f"optimizer.{named[0]}.exp_avg"
        )
    ]


@pytest.mark.parametrize("use_moe", [0, 1], ids=["dense", "moe"])
def test_gradient_of_a_step_is_the_same_in_every_layout(job, start, tokenizer, use_moe):
    step = [
        f"--use_moe={use_moe}",
        f"--from_weight={start[use_moe]}",
        "--max_steps=1",
        "--grad_clip=0",
    ]

    def run(name, *flags, **launch):
        return gradients(job(f"{name}_{use_moe}", 8, *step, *flags, **launch))

    whole = run("8x1", "--packing=0", "--batch_size=8")
    dataset = SFTDataset(job.data[8], tokenizer, 128, cache_dir=job.folder / "cache")
    assert dataset.supervised.max() > 10 * dataset.supervised.min()
    others = {
        "1x8": run("1x8", "--packing=0", "--batch_size=1", "--accumulation_steps=8"),
        "2 ranks x 2 x 2": run(
            "2x2x2", "--packing=0", "--batch_size=2", "--accumulation_steps=2", nproc=2
        ),
        "packed": run("packed", "--packing=1", "--batch_size=8"),
        "padded": padded_gradients(start[use_moe], use_moe, dataset, alpha=0.01),
    }
    errors = {name: relative_error(found, whole) for name, found in others.items()}
    assert max(errors.values()) <= 1e-5, errors
    if use_moe:  # the check above would miss an auxiliary loss that is lost everywhere
        without = padded_gradients(start[1], 1, dataset, alpha=0.0)
        assert relative_error(without, whole) > 1e-3


@pytest.mark.parametrize("use_moe", [0, 1], ids=["dense", "moe"])
def test_curves_of_1_2_and_4_processes_agree(job, use_moe):
    # 90 rows at 8 a step: the last window of an epoch has 2 rows, so with 4 processes two ranks
    # have none.
    flags = [
        f"--use_moe={use_moe}",
        "--packing=0",
        "--epochs=2",
        "--max_steps=20",
        "--global_batch_size=8",
    ]
    flags += ["--learning_rate=3e-3", "--eval_ratio=0.05"]
    runs = {
        n: curve(job(f"curve{n}_{use_moe}", 90, *flags, f"--batch_size={8 // n}", nproc=n))
        for n in (2, 4)
    }
    reference = curve(job(f"curve1_{use_moe}", 90, *flags, "--batch_size=3"))
    assert [line["step"] for line in reference] == [*range(1, 21), 20] and "eval_loss" in reference[
        -1
    ]
    assert reference[19]["loss"] < 0.9 * reference[0]["loss"]
    for lines in runs.values():
        for ours, expected in zip(lines, reference, strict=True):
            for key in ("tokens", "supervised_tokens", "lr", "epoch", "total_tokens"):
                assert ours.get(key) == expected.get(key)
            for key in expected.keys() & {"loss", "aux_loss", "eval_loss"}:
                assert ours[key] == pytest.approx(expected[key], rel=1e-5)


def test_an_epoch_trains_every_token_once_on_any_number_of_processes(job, tokenizer):
    dataset = SFTDataset(job.data[90], tokenizer, 100, cache_dir=job.folder / "cache")
    for name, nproc in (("epoch1", None), ("epoch3", 3)):
        lines = curve(
            job(
                name,
                90,
                "--batch_size=2",
                "--global_batch_size=7",
                "--max_seq_len=100",
                nproc=nproc,
            )
        )
        assert (
            sum(line["tokens"] for line in lines)
            == lines[-1]["total_tokens"]
            == dataset.lengths.sum()
        )
        assert sum(line["supervised_tokens"] for line in lines) == dataset.supervised.sum()


TWELVE_STEPS = ["--batch_size=4", "--max_steps=12", "--learning_rate=3e-3"]


@pytest.fixture(scope="module")
def twelve_losses(job) -> list[float]:
    return [line["loss"] for line in curve(job("plain", 90, *TWELVE_STEPS))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_follows_the_float32_curve(job, twelve_losses, dtype):
    losses = [line["loss"] for line in curve(job(dtype, 90, *TWELVE_STEPS, f"--dtype={dtype}"))]
    assert losses == pytest.approx(twelve_losses, rel=2e-2) and losses != twelve_losses


@pytest.mark.parametrize(
    "switch", ["gradient_checkpointing=1", "gradient_checkpointing=2", "compile=1"]
)
def test_gradient_checkpointing_and_compile_keep_the_curve(job, twelve_losses, switch):
    losses = [line["loss"] for line in curve(job(switch, 90, *TWELVE_STEPS, f"--{switch}"))]
    assert losses == pytest.approx(twelve_losses, rel=1e-5)
