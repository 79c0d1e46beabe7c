"""What goes wrong on one rank ends the job on all of them, at once, with the first error shown and no orphan."""

import re

import pytest
from conftest import RUN_FLAGS, conversations, curve, write_jsonl
from running import processes_of


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    data = write_jsonl(folder / "data.jsonl", conversations(90))
    fixed = [*RUN_FLAGS, f"--data_path={data}", f"--cache_dir={folder / 'cache'}", "--from_weight=none", "--ddp"]
    return [*fixed, "--batch_size=2", "--save_interval=4", "--max_steps=12", "--eval_ratio=0.1", "--eval_interval=3"]


CASES = [(phase, "ddp") for phase in ("data", "model", "forward", "clip", "evaluation", "save", "reader")]
CASES += [(phase, "zero3") for phase in ("clip", "save")]


@pytest.mark.parametrize("phase, strategy", CASES)
def test_a_rank_that_raises_ends_the_job(flags, tmp_path, start_script, phase, strategy):
    job = ["trainer/train_full_sft.py", *flags, f"--out_dir={tmp_path}", f"--strategy={strategy}", "--num_workers=2"]
    process = start_script("tests/sabotage.py", phase, "1", *job, nproc=2)
    assert process.wait(90) not in (0, None)
    log = process.log.read_text()
    assert f"sabotage in {phase}" in log
    assert re.search(rf"first observed failure(.|\n)*rank +: 1 (.|\n)*sabotage in {phase}", log), log
    assert not processes_of(process)


def alone(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag != "--ddp"]


def test_one_process_that_raises_ends_with_its_readers(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *alone(flags), f"--out_dir={tmp_path}", "--num_workers=8"]
    done = run_script("tests/sabotage.py", "clip", "0", *job)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: sabotage in clip\n"), done.stderr


def test_a_reader_that_is_killed_is_named(flags, tmp_path, run_script):
    """As where memory runs out."""
    job = ["trainer/train_full_sft.py", *alone(flags), f"--out_dir={tmp_path}", "--num_workers=2"]
    done = run_script("tests/sabotage.py", "killed", "0", *job)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    how = r"(is killed by signal: Killed|exited unexpectedly); where memory ran out take fewer --num_workers; "
    assert re.search(rf"a process that reads data ended: DataLoader worker \(pid.*\) {how}", line), line


def test_a_readers_mistake_is_one_line(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *alone(flags), f"--out_dir={tmp_path}", "--num_workers=2"]
    done = run_script("tests/sabotage.py", "mistake", "0", *job)
    assert (done.returncode, done.stderr) == (2, "error: sabotage in mistake\n")


def test_torchrun_starts_a_failed_rank_again(flags, tmp_path, run_script):
    """Which it can as soon as the rank has ended."""
    job = ["trainer/train_full_sft.py", *flags, f"--out_dir={tmp_path}", "--num_workers=2", "--resume=auto"]
    restarts = {"PET_MAX_RESTARTS": "1"}
    done = run_script("tests/sabotage.py", "clip", "1", *job, nproc=2, env=restarts)
    assert done.returncode == 0 and "sabotage in clip" in done.stderr, done.stderr
    assert "finished" in done.stdout


def test_replicas_that_differ_stop_the_run(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *flags, f"--out_dir={tmp_path}", "--replica_check=2"]
    done = run_script("tests/sabotage.py", "weight", "1", *job, nproc=2)
    assert done.returncode == 1
    error = "error: replicas differ at step 4: model.layers.1.mlp.up_proj.weight of rank 1 is not that of rank 0"
    assert error in done.stderr and "--resume auto" in done.stderr, done.stderr
    assert max(line["step"] for line in curve(next(path for path in tmp_path.iterdir() if path.is_dir()))) == 4


def test_most_ranks_decide_which_one_differs(flags, tmp_path, run_script):
    job = ["trainer/train_full_sft.py", *flags, f"--out_dir={tmp_path}", "--replica_check=4"]
    done = run_script("tests/sabotage.py", "weight", "0", *job, nproc=3)
    assert "step 4: model.layers.1.mlp.up_proj.weight of rank 0 is not that of rank 1" in done.stderr, done.stderr
