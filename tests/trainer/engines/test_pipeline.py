"""Pipelines give the curve of one process, under every schedule; checkpoints load anywhere."""

import json
import re
import signal
import subprocess

import pytest
import torch
from conftest import RUN_FLAGS, check_same_run, checkpoint_tensors, curve
from running import wait_for_steps

from model.lm import LMConfig, MiniMindLM
from runtime.engines import pipeline
from runtime.saving import rotation, validity

SCRIPT = "train_sft_pipeline"
FLAGS = [
    "--n_layers=4",
    "--max_steps=6",
    "--global_batch_size=8",
    "--learning_rate=3e-3",
    "--from_weight=none",
]
SAVES = ["--save_interval=3", "--save_total_limit=9", "--eval_ratio=0.1", "--replica_check=2"]
MOE = "--use_moe=1 --n_shared_experts=1"
# The last window of an epoch is shorter: micro-batches are empty
UNPACKED = "--packing=0 --epochs=3 --max_seq_len=100"

# name: (processes, the run of one process that it must equal, flags)
LAYOUTS = {
    "alone": (None, MOE, "--pipeline_parallel=1 --batch_size=2"),
    "gpipe": (2, MOE, "--pipeline_schedule=gpipe --batch_size=3"),
    "1f1b": (2, "", "--pipeline_schedule=1f1b --batch_size=2 --gradient_checkpointing=1"),
    "three stages": (3, UNPACKED, "--pipeline_parallel=3 --batch_size=2 --num_workers=1"),
    "interleaved x data": (4, MOE, "--pipeline_schedule=interleaved --batch_size=2"),
    "tensor": (4, MOE, "--tensor_parallel=2 --batch_size=2"),
}


@pytest.fixture(scope="module")
def runs(job):
    """Return run(name) -> the folder of a finished run with a checkpoint of step 3, trained once."""
    done = {}

    def run(name):
        nproc, same, flags = LAYOUTS.get(name, (None, name, "--batch_size=4"))
        script = SCRIPT if name in LAYOUTS else "train_full_sft"
        if name not in done:
            folder = re.sub(r"\W+", "_", name) or "dense"
            given = [*FLAGS, *SAVES, *same.split(), *flags.split()]
            done[name] = job(
                folder, 90, *given, nproc=nproc, script=script, count=name == "interleaved x data"
            )
        return done[name]

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_curve_and_weights_are_those_of_one_process(runs, name):
    check_same_run(runs(name), runs(LAYOUTS[name][1]))
    processes, _, flags = LAYOUTS[name]
    assert f" on {processes or 1} x cpu, pipeline x " in (runs(name) / "training.log").read_text()


@pytest.mark.parametrize("name", ["interleaved x data", "tensor"])
def test_checkpoints_hold_what_those_of_one_process_hold(runs, name):
    """Every stage has written its own tensors, the optimizer's state among them."""
    ours, expected = (
        checkpoint_tensors(runs(run) / "checkpoints/step_00000003") for run in (name, MOE)
    )
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        assert (value - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


@pytest.mark.parametrize(
    "before, after", [("interleaved x data", MOE), (MOE, "tensor"), ("gpipe", "gpipe")]
)
def test_a_run_goes_on_elsewhere(runs, job, before, after):
    nproc, same, flags = LAYOUTS.get(after, (None, after, "--batch_size=4"))
    resume = [*FLAGS, "--eval_ratio=0.1", f"--resume={runs(before) / 'checkpoints/step_00000003'}"]
    script = SCRIPT if after in LAYOUTS else "train_full_sft"
    name = re.sub(r"\W+", "_", f"{before} to {after}")
    resumed = job(name, 90, *resume, *same.split(), *flags.split(), nproc=nproc, script=script)
    check_same_run(resumed, runs(MOE), first=4)
    if before == after:
        losses = [
            [line["loss"] for line in curve(run) if "loss" in line]
            for run in (resumed, runs(before))
        ]
        assert losses[0] == losses[1][3:]  # to the bit


def test_a_signal_to_one_rank_saves_on_all(job, tmp_path, start_script, run_script):
    flags = [
        *RUN_FLAGS,
        *FLAGS[:1],
        *FLAGS[2:],
        "--ddp",
        "--batch_size=1",
        "--save_interval=0",
        "--epochs=50",
    ]
    flags += [
        f"--data_path={job.data[90]}",
        f"--cache_dir={job.folder / 'cache'}",
        f"--out_dir={tmp_path}",
    ]
    process = start_script(f"trainer/{SCRIPT}.py", *flags, nproc=2)
    wait_for_steps(process, tmp_path, 3)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", children[-1]], check=True)
    process.wait(60)
    assert "stopped by signal 15" in process.log.read_text()
    (saved,) = rotation.list_checkpoints(tmp_path / "full_sft_32/checkpoints")
    assert validity.fault(saved) == "" and "exitcode  : 143" in process.log.read_text()


def test_one_gradient_exchange_per_step_whatever_the_accumulation(runs):
    """Six steps of two micro-batches.

    Rank 0 holds two blocks of 14 tensors, and the embedding, which is tied to the head of the last stage; loss and norm are a message each, so are evaluation
    and three checks of replicas.
    """
    counts = json.loads((runs("interleaved x data") / "collectives.json").read_text())
    assert counts["allreduce_"] == 6 * (2 * 14 + 1 + 1 + 2) + 1 + 3


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", range(1, 9))
def test_layers_are_dealt_out_in_order_and_evenly(stages):
    held = [list(pipeline.layers_of(stage, stages, 8)) for stage in range(stages)]
    assert sum(held, []) == [*range(8)]
    assert {len(layers) for layers in held} <= {8 // stages, 8 // stages + 1}
    assert len(held[-1]) == 8 // stages  # the head is work, too


@pytest.mark.parametrize("tied", [True, False])
def test_processes_hold_their_own_layers_under_the_names_of_the_model(tied):
    def model():
        return MiniMindLM(
            LMConfig(
                dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=50, tie_embeddings=tied
            )
        )

    whole = {name for name, _ in model().named_parameters()}
    parts = [pipeline.cut(model(), [n], n == 0, n == 2) for n in range(3)]
    names = [{name for name, _ in part.named_parameters()} for part in parts]
    assert set.union(*names) == whole and all(len(held) < len(whole) for held in names)
    shared = {"model.embed_tokens.weight"} if tied else set()
    assert names[0] & names[2] == shared and not names[1] & (names[0] | names[2])
    if tied:
        assert parts[2].lm_head.weight is parts[2].model.embed_tokens.weight


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, processes, micro_batches, said",
    [
        (
            "1f1b",
            5,
            8,
            "--pipeline_schedule 1f1b --pipeline_parallel 5 has 5 stages, but --n_layers 4",
        ),
        (
            "interleaved",
            3,
            6,
            "--pipeline_parallel 3 has 6 stages, but --n_layers 4: each needs a layer at least",
        ),
        ("interleaved", 1, 4, "one process has no neighbour to take turns with: use gpipe or 1f1b"),
        ("1f1b", 4, 3, "needs at least 4 micro-batches per step: change --accumulation_steps"),
        (
            "interleaved",
            2,
            5,
            "needs a multiple of 2 micro-batches per step: change --accumulation_steps",
        ),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(schedule, processes, micro_batches, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pipeline.check_sizes(schedule, processes, 4, micro_batches)


@pytest.mark.parametrize(
    "schedule, micro_batches", [("gpipe", 1), ("1f1b", 2), ("interleaved", 1), ("interleaved", 3)]
)
def test_what_a_schedule_can_do_is_allowed(schedule, micro_batches):
    pipeline.check_sizes(schedule, 2, 4, micro_batches)


@pytest.mark.parametrize(
    "processes, said", [(1, "needs --ddp and a launcher"), (3, "does not divide 3 processes")]
)
def test_processes_that_do_not_fit_are_refused(monkeypatch, processes, said):
    monkeypatch.setattr(pipeline, "world", lambda: (0, processes))
    monkeypatch.setattr(pipeline.dist, "is_initialized", lambda: processes > 1)
    with pytest.raises(
        ValueError,
        match=f"--pipeline_parallel 2 x --tensor_parallel 1 {said}: torchrun --nproc_per",
    ):
        pipeline.make_mesh(torch.device("cpu"), 2, 1)


@pytest.mark.parametrize(
    "nproc, given, said",
    [
        (None, "--pipeline_parallel=0", "--pipeline_parallel 0: must be positive"),
        (
            2,
            "--ddp --accumulation_steps=1",
            "--pipeline_schedule 1f1b --pipeline_parallel 2 needs at least 2 micro-",
        ),
    ],
)
def test_bad_flags_are_one_line(job, run_script, tmp_path, nproc, given, said):
    flags = [
        *RUN_FLAGS,
        f"--data_path={job.data[8]}",
        f"--cache_dir={job.folder / 'cache'}",
        f"--out_dir={tmp_path}",
    ]
    done = run_script(f"trainer/{SCRIPT}.py", *flags, *given.split(), nproc=nproc)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert done.returncode == 2 if nproc is None else "exitcode  : 2" in done.stderr
    assert not list(tmp_path.rglob("*.pth"))
