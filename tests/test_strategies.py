"""Every way to spread a run over processes gives the curve of one process, and continues the run of any other."""

import json

import pytest
from conftest import RUN_FLAGS, check_same_run, checkpoint_tensors, curve

FLAGS = "--use_moe=1 --n_shared_experts=1 --max_steps=6 --global_batch_size=8 --learning_rate=3e-3".split()

# name: (processes, flags). The global batch is 8 everywhere; on 4 processes a step is one micro-batch.
LAYOUTS = {
    "ddp x 4": (4, "--strategy=ddp --batch_size=2"),
    "zero1": (2, "--strategy=zero1 --batch_size=2"),
    "zero2": (2, "--strategy=zero2 --batch_size=2"),
    "zero3 offload": (2, "--strategy=zero3 --offload=1 --batch_size=4"),
    "tensor": (2, "--tensor_parallel=2 --batch_size=4"),
    "context": (2, "--context_parallel=2 --batch_size=4"),
    "all": (4, "--strategy=zero3 --tensor_parallel=2 --context_parallel=2 --batch_size=2"),
}
# From -> to: checkpoints of the first go on under the second.
MOVES = [
    ("one", "zero1"), ("zero1", "zero3 offload"), ("zero3 offload", "ddp x 4"), ("all", "one"), ("zero2", "tensor"),
    ("context", "zero2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(job):
    """run(name) -> the folder of a finished run, trained once, with a checkpoint of step 3."""
    done = {}

    def run(name):
        if name not in done:
            nproc, flags = LAYOUTS.get(name, (None, "--batch_size=3"))
            saves = ["--save_interval=3", "--save_total_limit=9", "--eval_ratio=0.1"]
            done[name] = job(name.replace(" ", "_"), 90, *FLAGS, *saves, *flags.split(), nproc=nproc)
        return done[name]

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_curve_and_weights_are_those_of_one_process(runs, name):
    check_same_run(runs(name), runs("one"))


@pytest.mark.parametrize("before, after", MOVES, ids=[f"{a} to {b}" for a, b in MOVES])
def test_a_run_goes_on_under_another_strategy(runs, job, before, after):
    source = runs(before) / "checkpoints/step_00000003"
    nproc, flags = LAYOUTS.get(after, (None, "--batch_size=3"))
    name = f"{before}_{after}".replace(" ", "_")
    resumed = job(name, 90, *FLAGS, "--eval_ratio=0.1", f"--resume={source}", *flags.split(), nproc=nproc)
    check_same_run(resumed, runs("one"), first=4)


def test_checkpoints_hold_the_same_whatever_the_strategy(runs):
    """Also the optimizer's state, which the curve shows only later."""
    reference = checkpoint_tensors(runs("one") / "checkpoints/step_00000003")
    for name in ("zero1", "all"):
        tensors = checkpoint_tensors(runs(name) / "checkpoints/step_00000003")
        assert tensors.keys() == reference.keys()
        for key, value in tensors.items():
            assert (value - reference[key]).norm() <= 1e-4 * reference[key].norm(), (name, key)


def test_context_parallel_with_fewer_key_heads_than_ranks(job):
    """Ulysses has no head for every rank then: keys and values are gathered instead."""
    flags = [*FLAGS, "--n_kv_heads=1", "--max_steps=3"]
    reference = curve(job("gathered_one", 90, *flags, "--batch_size=3"))
    lines = curve(job("gathered", 90, *flags, "--context_parallel=2", "--batch_size=4", nproc=2))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in reference], rel=1e-5)


@pytest.fixture(scope="module")
def collectives(job, run_script):
    """count(nproc, *flags) -> {"allreduce_": number, ...} of three steps."""

    def count(nproc, *flags):
        out = job.folder / "_".join(["count", *flags]).replace("--", "").replace("=", "")
        fixed = [*RUN_FLAGS, f"--data_path={job.data[90]}", f"--cache_dir={job.folder / 'cache'}", f"--out_dir={out}"]
        fixed += ["--max_steps=3", "--ddp", "--from_weight=none", "--save_interval=0", "--packing=0"]
        done = run_script("tests/count_collectives.py", "trainer/train_full_sft.py", *fixed, *flags, nproc=nproc)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("collectives "))
        return json.loads(line.removeprefix("collectives "))

    return count


def test_ddp_exchanges_gradients_once_per_step_whatever_the_accumulation(collectives):
    once = collectives(2, "--strategy=ddp", "--batch_size=4")
    split = collectives(2, "--strategy=ddp", "--batch_size=1", "--accumulation_steps=4")
    assert 0 < split["allreduce_"] <= once["allreduce_"]  # a static graph needs one more, in its first step


def test_zero2_exchanges_gradients_once_per_step_whatever_the_accumulation(collectives):
    """A message for each of the two blocks and one for what is left, in three steps of four micro-batches."""
    counts = collectives(2, "--strategy=zero2", "--batch_size=1", "--accumulation_steps=4")
    assert counts["_reduce_scatter_base_"] == 3 * (2 + 1)
