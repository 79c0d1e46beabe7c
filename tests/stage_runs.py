"""Tiny runs of the stages behind SFT, and what their tests compare."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import RUN_FLAGS, curve, write_jsonl
from running import run_ranks

# A model that has learned nothing gets some of this reward by chance; the same completions, the
# same numbers.
REWARD = """
import os
calls = []
def letters(prompts, completions, rows):
    calls.append(1)
    if str(len(calls)) == os.environ.get("KILLED_AT_CALL"):
        os.kill(os.getpid(), 9)
    return [min(1.0, sum(c in row["answer"] for c in text) / 20) for text, row in zip(completions, rows)]
def broken(prompts, completions, rows):
    return [float("nan")] * len(rows)
"""


def trainer(stage: str, folder: Path, flags: list[str]):
    """Return train(name, *flags, nproc=) -> the run's folder; train.printed is the last output."""

    def train(name: str, *more: str, nproc: int | None = None) -> Path:
        words = [f"trainer/train_{stage}.py", *flags, f"--out_dir={folder / name}", *more]
        train.printed = run_ranks(*words, *(["--ddp"] if nproc else []), nproc=nproc)
        return next(
            path
            for path in (folder / name).iterdir()
            if path.is_dir() and ".previous" not in path.name
        )

    train.folder, train.flags = folder, flags
    return train


def prompt_runs(stage: str, folder: Path, flags: list[str], prompts: int):
    """A `trainer` of a stage that learns from rollouts; train.one(*flags, name=) makes a run once."""
    rows = [{"messages": [{"role": "user", "content": "say " * (1 + n % 5) + str(n)}], "answer": "aeiou t"[n % 3 :]}
            for n in range(prompts)]  # fmt: skip
    data = write_jsonl(folder / "prompts.jsonl", rows)
    (folder / "reward.py").write_text(REWARD)
    train = trainer(
        stage, folder, [*flags, f"--data_path={data}", f"--reward={folder / 'reward.py'}:letters"]
    )
    done = {}

    def one(*more: str, name: str = "one") -> Path:
        if name not in done:
            done[name] = train(name, *more)
        return done[name]

    train.one = one
    return train


def pair_runs(stage: str, folder: Path, steps: int, *flags: str):
    """A `trainer` of a stage for preference pairs; the last window of an epoch is shorter."""
    rows = [
        {
            "prompt": f"say {n}",
            "chosen": "yes " * (1 + n * n % 11),
            "rejected": "no " * (1 + n * 5 % 13),
        }
        for n in range(57)
    ]
    data = write_jsonl(folder / "pairs.jsonl", rows)
    fixed = [
        *RUN_FLAGS,
        f"--data_path={data}",
        f"--cache_dir={folder / 'cache'}",
        "--max_seq_len=64",
    ]
    fixed += [
        "--from_weight=none",
        "--global_batch_size=4",
        "--batch_size=2",
        f"--max_steps={steps}",
        "--epochs=9",
    ]
    fixed += ["--eval_ratio=0.1", "--replica_check=1", "--save_interval=5"]
    return trainer(stage, folder, [*fixed, *flags])


def same_metrics(run: Path, reference: Path, rel: float, abs: float) -> None:
    """Every number of every line, the measured speed apart."""
    ours, expected = curve(run), curve(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    for line, wanted in zip(ours, expected, strict=True):
        names = [name for name in wanted if name != "tokens_per_sec"]
        assert [line[n] for n in names] == pytest.approx(
            [wanted[n] for n in names], rel=rel, abs=abs
        ), line["step"]


def same_rollouts(run: Path, reference: Path) -> None:
    """The same completions, and what was learned from them."""
    ours, expected = curve(run), curve(reference)
    exact = ("step", "epoch", "lr", "tokens", "supervised_tokens", "completion_length", "truncated")
    close = ("loss", "aux_loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "ratio")
    assert len(ours) == len(expected) > 9
    for line, wanted in zip(ours, expected, strict=True):
        assert [line[key] for key in exact] == [wanted[key] for key in exact]
        for key in close:
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), (line["step"], key)


def same_bits(run: Path, reference: Path, first: int = 0) -> None:
    """Metrics from line `first` on and weights, to the last bit; only the speed differs."""
    lines, wanted = (
        [{**line, "tokens_per_sec": 0} for line in curve(path)] for path in (run, reference)
    )
    assert lines == wanted[first:]
    weights, expected = (torch.load(f"{path}.pth", weights_only=True) for path in (run, reference))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def resumed_three_times(train, *flags: str) -> Path:
    """A run of 8 steps that saves every second one, as if killed two steps later each time."""
    for left in (2, 4, 6, None):  # the step behind which the run is as if killed
        run = train(
            "parts",
            *flags,
            "--max_steps=8",
            "--save_interval=2",
            "--save_total_limit=9",
            "--resume=auto",
        )
        for path in (run / "checkpoints").glob("step_*") if left else []:
            if int(path.name[5:]) > left:
                shutil.rmtree(path)
    return run
