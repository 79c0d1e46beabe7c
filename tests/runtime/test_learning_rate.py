"""The learning rate of every step: --lr_schedule, and --lr_scaling by the number of processes."""

import inspect
import math

import pytest
from conftest import RUN_FLAGS, check_same_run, curve
from running import STAGE_SCRIPTS, run_script

from runtime.optim import scale_lr
from trainer.train_pretrain import get_lr

STAGES = list(STAGE_SCRIPTS.values())
FLAGS = (
    "--max_steps=6 --batch_size=2 --eval_ratio=0.1 --learning_rate=1e-3 --warmup_ratio=0.34".split()
)


def rates(total: int, warmup: int, *schedule: str) -> list[float]:
    return [get_lr(step, total, 2.0, warmup, *schedule) for step in range(total)]


def test_cosine_is_the_default_and_what_it_was():
    wanted = [2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 8))) for step in range(8)]
    assert rates(10, 2) == rates(10, 2, "cosine") == [1.0, 2.0, *wanted]
    assert inspect.signature(get_lr).parameters["schedule"].default == "cosine"


def test_linear_goes_to_zero_behind_the_last_step():
    assert rates(10, 2, "linear") == pytest.approx(
        [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    )


def test_constant():
    assert rates(6, 4, "constant") == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_stable_decay():
    """The decay is the last tenth of what comes behind the warm-up."""
    found = rates(120, 20, "wsd")
    assert (
        found[:20] == [2.0 * (step + 1) / 20 for step in range(20)] and found[20:110] == [2.0] * 90
    )
    assert found[110:] == pytest.approx([2.0 * left / 10 for left in range(10, 0, -1)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (3, 3), (7, 2), (1000, 30)])
def test_every_step_has_a_rate(schedule, total, warmup):
    found = rates(total, warmup, schedule)
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[:warmup] == sorted(found[:warmup]) and found[warmup:] == sorted(
        found[warmup:], reverse=True
    )


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_every_stage_obeys_the_flags(path):
    text = path.read_text()
    call = "get_lr(run.step, args.total_steps, args.peak_lr, warmup_steps, args.lr_schedule)"
    assert text.count(call) == text.count("get_lr(run.") == 1
    assert text.count("args.peak_lr = scale_lr(args.learning_rate, args.lr_scaling, ") == 1


def test_scaling():
    assert [scale_lr(3e-4, how, 4) for how in ("none", "linear", "sqrt")] == [3e-4, 12e-4, 6e-4]
    assert all(scale_lr(5e-4, how, 1) == 5e-4 for how in ("none", "linear", "sqrt"))


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(job):
    """Two processes with half the learning rate, and a batch of four rows."""
    flags = [
        *FLAGS,
        "--learning_rate=5e-4",
        "--lr_scaling=linear",
        "--lr_schedule=linear",
        "--save_interval=3",
    ]
    return job("two", 90, *flags, nproc=2)


def test_processes_multiply_the_rate(job, two):
    """What is logged is what is taken."""
    one = job("one", 90, *FLAGS, "--lr_schedule=linear", "--accumulation_steps=2")
    check_same_run(two, one)
    assert [line["lr"] for line in curve(two) if "loss" in line] == [
        get_lr(n, 6, 1e-3, 2, "linear") for n in range(6)
    ]
    assert "learning rate 0.001\n" in (two / "training.log").read_text()


def test_processes_that_share_rows_do_not(job):
    """They are data-parallel processes that make a batch larger."""
    flags = [*FLAGS, "--max_steps=1", "--lr_scaling=linear", "--warmup_ratio=0"]
    assert curve(job("tensor", 90, *flags, "--tensor_parallel=2", nproc=2))[0]["lr"] == 1e-3


def test_another_number_of_processes_would_be_another_run(job, two):
    """Also with --global_batch_size, where the rows of a step stay the same."""
    fixed = [*FLAGS, "--learning_rate=5e-4", "--global_batch_size=4", "--lr_schedule=linear"]
    out, source = job.folder / "refused", f"--resume={two / 'checkpoints/step_00000003'}"
    places = [
        f"--data_path={job.data[90]}",
        f"--cache_dir={job.folder / 'cache'}",
        f"--out_dir={out}",
    ]
    done = run_script(
        "trainer/train_full_sft.py", *RUN_FLAGS, *fixed, *places, source, "--lr_scaling=linear"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "another run: --learning_rate was 0.001 and is 0.0005. " in done.stderr, (
        "both as --lr_scaling makes them"
    )
    resumed = job("resumed", 90, *fixed, source, "--learning_rate=1e-3")  # the remedy
    check_same_run(resumed, two, first=4)
