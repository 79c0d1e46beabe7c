"""Every way to spread a run over processes gives the curve of one process, and continues the run of
any other."""

import json

import pytest
import torch
from conftest import check_same_run, checkpoint_tensors, curve

FLAGS = "--use_moe=1 --n_shared_experts=1 --max_steps=6 --global_batch_size=8 --learning_rate=3e-3".split()

# name: (processes, flags). The global batch is 8 everywhere; some ranks have more micro-batches.
LAYOUTS = {
    "ddp x 3": (3, "--strategy=ddp --batch_size=1"),
    "zero1": (2, "--strategy=zero1 --batch_size=2"),
    "zero2": (2, "--strategy=zero2 --batch_size=2"),
    "zero3 offload": (2, "--strategy=zero3 --offload=1 --batch_size=4"),
    "tensor": (2, "--tensor_parallel=2 --batch_size=4"),
    "context": (2, "--context_parallel=2 --batch_size=4"),
    "all": (4, "--strategy=zero3 --tensor_parallel=2 --context_parallel=2 --batch_size=2"),
}
# From -> to: checkpoints of the first go on under the second.
MOVES = [
    ("one", "zero1"), ("zero1", "zero3 offload"), ("zero3 offload", "ddp x 3"), ("all", "one"), ("zero2", "tensor"),
    ("context", "zero2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(job):
    """run(name) -> the folder of a finished run, trained once, with a checkpoint of step 3."""
    done = {}

    def run(name):
        if name not in done:
            nproc, flags = LAYOUTS.get(name, (None, "--batch_size=3"))
            given = [
                *FLAGS,
                "--save_interval=3",
                "--save_total_limit=9",
                "--eval_ratio=0.1",
                *flags.split(),
            ]
            count = name in ("ddp x 3", "zero2")
            done[name] = job(name.replace(" ", "_"), 90, *given, nproc=nproc, count=count)
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
    resumed = job(
        name, 90, *FLAGS, "--eval_ratio=0.1", f"--resume={source}", *flags.split(), nproc=nproc
    )
    check_same_run(resumed, runs("one"), first=4)


def test_checkpoints_hold_the_same_whatever_the_strategy(runs):
    """Also the optimizer's state, which the curve shows only later."""
    reference = checkpoint_tensors(runs("one") / "checkpoints/step_00000003")
    for name in ("zero1", "all"):
        tensors = checkpoint_tensors(runs(name) / "checkpoints/step_00000003")
        assert tensors.keys() == reference.keys()
        for key, value in tensors.items():
            assert (value - reference[key]).norm() <= 1e-4 * reference[key].norm(), (name, key)


def test_muon_gets_whole_matrices_wherever_they_lie(job):
    """Its products are in bfloat16 where that is fast, so the weights agree less closely."""
    flags = [*FLAGS, "--optimizer=muon", "--max_steps=3"]
    reference = job("muon_one", 90, *flags, "--batch_size=3")
    nproc, layout = LAYOUTS["all"]
    run = job("muon_all", 90, *flags, *layout.split(), nproc=nproc)
    assert [line["loss"] for line in curve(run)] == pytest.approx(
        [line["loss"] for line in curve(reference)], rel=1e-3
    )
    weights, expected = (torch.load(f"{path}.pth", weights_only=True) for path in (run, reference))
    for name, value in weights.items():
        assert (value - expected[name]).norm() <= 0.04 * expected[name].norm(), name


def test_context_parallel_with_fewer_key_heads_than_ranks(job):
    """Ulysses has no head for every rank then: keys and values are gathered instead."""
    flags = [*FLAGS, "--n_kv_heads=1", "--max_steps=3"]
    reference = curve(job("gathered_one", 90, *flags, "--batch_size=3"))
    lines = curve(job("gathered", 90, *flags, "--context_parallel=2", "--batch_size=4", nproc=2))
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in reference], rel=1e-5
    )


@pytest.mark.parametrize(
    "name, message, in_a_step, beside",
    [
        ("ddp x 3", "allreduce_", 1 + 1, 1),  # a bucket, and the sums of a step; an evaluation
        ("zero2", "_reduce_scatter_base_", 2 + 1, 0),  # each of the two blocks, and what is left
    ],
)
def test_one_gradient_exchange_per_step_whatever_the_accumulation(
    runs, name, message, in_a_step, beside
):
    """Steps of three and of two micro-batches."""
    counts = json.loads((runs(name) / "collectives.json").read_text())
    assert counts[message] == 6 * in_a_step + beside
