"""Streams that are closed, that nobody reads, or that are full: a run goes on, other scripts end
without a traceback.

Every script, stage and engine has each of them in turn; what launchers and shells do is tested with
real processes.
"""

import subprocess
import sys

import pytest
from conftest import chat, write_jsonl
from running import ROOT, run_script

from benchmarks import fuzz_flags


def test_every_script_outlives_its_streams():
    done = run_script(
        "benchmarks/fuzz_flags.py", "--streams", "--cases", 30, "--limit", 100, timeout=280
    )
    assert done.returncode == 0 and " 0 faults" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def flags(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [chat("hi", "ho")] * 6)
    flags = {
        **fuzz_flags.TINY,
        "data_path": data,
        "cache_dir": tmp_path / "cache",
        "out_dir": tmp_path / "out",
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.parametrize("script", ["trainer/train_full_sft.py", "scripts/run_distributed.py"])
def test_a_run_without_any_stream(script, flags, tmp_path):
    """The launcher's processes inherit them; no file that is opened gets the number of one, and
    what is printed."""
    words = [
        sys.executable,
        str(ROOT / script),
        *(["--nproc_per_node=2"] if "run" in script else []),
        *flags,
    ]
    done = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *words], timeout=120)
    assert done.returncode == 0
    log = (tmp_path / "out/full_sft_32/training.log").read_text().splitlines()
    assert "step 1/1" in log[-2] and "finished; weights in" in log[-1]


def test_a_chat_ends_when_nobody_reads_it(flags, tmp_path, start_weights):
    """Its input alone would not end it."""
    command = (
        f"yes hi | {sys.executable} {ROOT}/eval_model.py --device cpu --out_dir {start_weights} |"
        " head -1"
    )
    command = f"{command}; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 141 and done.stderr == "" and "full_sft_32: " in done.stdout


def test_help_for_a_reader_that_leaves():
    command = (
        f"{sys.executable} {ROOT}/trainer/train_full_sft.py --help | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
