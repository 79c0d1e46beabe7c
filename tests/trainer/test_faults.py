"""What goes wrong on one rank ends the job on all, with the first error shown and no orphan."""

import math
import re

import pytest
from conftest import RUN_FLAGS, conversations, curve, write_jsonl
from running import ROOT, STAGE_SCRIPTS, processes_of, run_ranks

from runtime.distributed import replicas
from runtime.distributed.replicas import agree_on_step


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    data = write_jsonl(folder / "data.jsonl", conversations(90))
    fixed = [
        *RUN_FLAGS,
        f"--data_path={data}",
        f"--cache_dir={folder / 'cache'}",
        "--from_weight=none",
        "--ddp",
    ]
    return [
        *fixed,
        "--batch_size=2",
        "--save_interval=4",
        "--max_steps=12",
        "--eval_ratio=0.1",
        "--eval_interval=3",
    ]


CASES = [
    (phase, "ddp") for phase in ("data", "model", "forward", "clip", "evaluation", "save", "reader")
]
CASES += [(phase, "zero3") for phase in ("clip", "save")]


@pytest.mark.parametrize("phase, strategy", CASES)
def test_a_rank_that_raises_ends_the_job(flags, tmp_path, start_script, phase, strategy):
    job = [
        "trainer/train_full_sft.py",
        *flags,
        f"--out_dir={tmp_path}",
        f"--strategy={strategy}",
        "--num_workers=2",
    ]
    process = start_script("tests/sabotage.py", phase, "1", *job, nproc=2)
    assert process.wait(90) not in (0, None)
    log = process.log.read_text()
    assert f"sabotage in {phase}" in log
    assert re.search(rf"first observed failure(.|\n)*rank +: 1 (.|\n)*sabotage in {phase}", log), (
        log
    )
    assert not processes_of(process)


def alone(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag != "--ddp"]


def test_one_process_that_raises_ends_with_its_readers(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *alone(flags), f"--out_dir={tmp_path}", "--num_workers=8"]
    done = run_script("tests/sabotage.py", "clip", "0", *job)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: sabotage in clip\n"), (
        done.stderr
    )


def test_a_reader_that_is_killed_is_named(flags, tmp_path, run_script):
    """As where memory runs out."""
    job = ["trainer/train_full_sft.py", *alone(flags), f"--out_dir={tmp_path}", "--num_workers=2"]
    done = run_script("tests/sabotage.py", "killed", "0", *job)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    how = (
        r"(is killed by signal: Killed|exited unexpectedly); where memory ran out take fewer"
        r" --num_workers; "
    )
    assert re.search(
        rf"a process that reads data ended: DataLoader worker \(pid.*\) {how}", line
    ), line


def test_a_readers_mistake_is_one_line(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *alone(flags), f"--out_dir={tmp_path}", "--num_workers=2"]
    done = run_script("tests/sabotage.py", "mistake", "0", *job)
    assert (done.returncode, done.stderr) == (2, "error: sabotage in mistake\n")


def test_torchrun_starts_a_failed_rank_again(flags, tmp_path, run_script):
    """Which it can as soon as the rank has ended."""
    job = [
        "trainer/train_full_sft.py",
        *flags,
        f"--out_dir={tmp_path}",
        "--num_workers=2",
        "--resume=auto",
    ]
    # As scripts/run_distributed.py has it: torchrun's own store keeps the addresses of dead
    # processes.
    restarts = {"PET_MAX_RESTARTS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = run_script("tests/sabotage.py", "clip", "1", *job, nproc=2, env=restarts)
    assert done.returncode == 0 and "sabotage in clip" in done.stderr, done.stderr
    assert "finished" in done.stdout


def test_replicas_that_differ_stop_the_run(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *flags, f"--out_dir={tmp_path}", "--replica_check=2"]
    done = run_script("tests/sabotage.py", "weight", "1", *job, nproc=2)
    assert done.returncode == 1
    error = (
        "error: replicas differ at step 4: model.layers.1.mlp.up_proj.weight of rank 1 is not that"
        " of rank 0"
    )
    assert error in done.stderr and "--resume auto" in done.stderr, done.stderr
    assert (
        max(
            line["step"]
            for line in curve(next(path for path in tmp_path.iterdir() if path.is_dir()))
        )
        == 4
    )


def test_most_ranks_decide_which_one_differs(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *flags, f"--out_dir={tmp_path}", "--replica_check=4"]
    done = run_script("tests/sabotage.py", "weight", "0", *job, nproc=3)
    assert (
        "step 4: model.layers.1.mlp.up_proj.weight of rank 0 is not that of rank 1" in done.stderr
    ), done.stderr


# What a rank holds of a gradient changes behind the exchange. Where all ranks hold all of it, that
# is seen, in the same step; where it is one rank's part, a NaN reaches all norms.
COPIES = [
    ("train_full_sft", "--strategy=ddp"),
    ("train_full_sft", "--strategy=zero1"),
    ("train_full_sft", "--strategy=ddp --context_parallel=2"),
    ("train_sft_accelerate", ""),
    ("train_sft_lightning", ""),
    ("train_sft_deepspeed", "--deepspeed_config=configs/deepspeed/zero0.json"),
]
PARTS = [
    ("train_full_sft", "--strategy=zero2"),
    ("train_full_sft", "--strategy=zero3"),
    ("train_full_sft", "--tensor_parallel=2"),
    ("train_sft_lightning", "--strategy=model_parallel"),
    ("train_sft_pipeline", "--pipeline_parallel=2"),
    ("train_sft_pipeline", "--pipeline_parallel=1"),
]


@pytest.fixture
def spoil(flags, tmp_path):
    """Return spoil(phase, script, flags, exit code) -> what two ranks print, one sabotaged."""

    def spoil(phase: str, script: str, own: str, code: int) -> str:
        if (engine := script.removeprefix("train_sft_")) in (
            "accelerate",
            "lightning",
            "deepspeed",
        ):
            pytest.importorskip(engine)
        job = [
            ROOT / f"trainer/{script}.py",
            *flags,
            f"--out_dir={tmp_path}",
            "--max_steps=4",
            *own.split(),
        ]
        return run_ranks("tests/sabotage.py", phase, "1", *job, nproc=2, code=code)

    return spoil


@pytest.mark.parametrize("phase", ["nan", "flip"])
@pytest.mark.parametrize("script, own", COPIES)
def test_gradients_that_differ_between_ranks_stop_the_run(spoil, script, own, phase):
    printed = spoil(phase, script, own, 1)
    norm = "nan" if phase == "nan" else r"[\d.]+"
    error = (
        rf"^error: gradients differ behind their exchange: their norm is {norm} on rank 1 and"
        r" [\d.]+ on rank 0; "
    )
    assert re.search(error, printed, re.MULTILINE), printed
    assert "step 2/4" in printed and "step 3" not in printed and "Traceback" not in printed


@pytest.mark.parametrize("script, own", PARTS)
def test_a_nan_in_the_part_of_one_rank_is_skipped_by_all(spoil, script, own):
    printed = spoil("nan", script, own, 0)
    assert re.search(r"^step 3 skipped: loss [\d.]+, gradient norm nan", printed, re.MULTILINE), (
        printed
    )
    assert "step 4/4" in printed and "finished; weights in" in printed


def test_no_stage_decides_on_a_step_by_numbers_of_its_own():
    for path in STAGE_SCRIPTS.values():
        text = path.read_text()
        assert text.count("parallel.agree_on_step(grad_norm, ") == 1, path
        assert re.search(r"finite = math\.isfinite\(.*loss.* \+ grad_norm\)\n", text), path


NORMS = {
    "of all": ([math.nan] * 3, None),
    "of all, on machines of two kinds": ([1.0, 1.0 + 1e-8, 1.0], None),
    "too large for all": ([math.inf, math.nan, math.inf], None),
    "of one": ([2.0, 2.0, math.nan], "nan on rank 2 and 2 on rank 0"),
    "of the first": ([3.0, 2.0, 2.0], "3 on rank 0 and 2 on rank 1"),
    "of two ranks, one of them not finite": ([math.inf, 2.0], "inf on rank 0 and 2 on rank 1"),
}


@pytest.mark.parametrize("name", NORMS)
def test_whose_norm_differs(monkeypatch, name):
    norms, told = NORMS[name]
    monkeypatch.setattr(
        replicas, "gather_numbers", lambda *own: [[norm, 1.0, 2.0] for norm in norms]
    )
    if told is None:
        _, *sums = agree_on_step(norms[0], 1.0, 2.0)
        assert sums == [len(norms), 2 * len(norms)]
    else:
        with pytest.raises(FloatingPointError, match=told):
            agree_on_step(norms[0], 1.0, 2.0)
