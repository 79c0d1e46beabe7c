"""No process outlives its launcher, whenever that is killed; a run outlives its shell."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import RUN_FLAGS, conversations, write_jsonl
from running import ROOT, processes_of, wait_for_end, wait_for_steps, wait_until

from runtime.distributed import orphans

# Every rank stops here, at a moment of its start, until the test lets go of the lock.
HOLD = """
import fcntl, os, sys

def hold():
    name = os.environ["HOLD_AT"] + os.environ["RANK"]
    open(os.path.join(os.environ["HOLD"], name), "w").close()
    fcntl.flock(open(os.path.join(os.environ["HOLD"], "lock")), fcntl.LOCK_SH)

class Importing:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(Importing)
            hold()

if "RANK" in os.environ:
    hold() if os.environ["HOLD_AT"] == "start" else sys.meta_path.insert(0, Importing)
"""
TRAIN = ["trainer/train_full_sft.py", "--ddp"]
LAUNCHER = ["scripts/run_distributed.py", "--nproc_per_node=2", "--max_restarts=1"]
# Script, processes, the moment, who is killed.
CASES = {
    "torchrun, Python starts": (TRAIN, 2, "start", "launcher"),
    "torchrun, ranks import": (TRAIN, 2, "import", "launcher"),
    "our launcher, ranks import": (LAUNCHER, None, "import", "launcher"),
    "torchrun below our launcher, Python starts": (LAUNCHER, None, "start", "parent"),
    "doctor, Python starts": (["scripts/doctor.py"], None, "start", "launcher"),
}


@pytest.fixture
def flags(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", conversations(90))
    places = [
        f"--data_path={data}",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--out_dir={tmp_path / 'out'}",
    ]
    return [
        *RUN_FLAGS,
        *places,
        "--from_weight=none",
        "--epochs=10000",
        "--save_interval=0",
        "--num_workers=2",
    ]


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_their_launcher(start_script, flags, tmp_path, case):
    script, nproc, moment, victim = CASES[case]
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    variables = {"PYTHONPATH": tmp_path, "HOLD": tmp_path, "HOLD_AT": moment}
    words = [*script, *([] if "doctor" in case else flags)]
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_script(*words, nproc=nproc, env=variables)
        wait_until(process, lambda: all((tmp_path / f"{moment}{rank}").exists() for rank in (0, 1)))
        (rank,) = processes_of(process, "RANK=1")
        os.kill(process.pid if victim == "launcher" else parent_of(rank), signal.SIGKILL)
        process.wait(60)
    wait_for_end(process)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("victim", ["torchrun", "rank"])
def test_readers_end_with_their_rank(start_script, flags, tmp_path, victim):
    process = start_script(*TRAIN, *flags, nproc=2)
    wait_for_steps(process, tmp_path / "out", 3)
    os.kill(
        process.pid if victim == "torchrun" else processes_of(process, "RANK=1")[0], signal.SIGKILL
    )
    wait_for_end(process)


# A process of ours without torch: it watches its launcher, and says when it does.
CHILD = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from runtime import launcher
from runtime.distributed import orphans
{without_kernel}
launcher.die_with_launcher()
open(sys.argv[2], "w").close()
signal.pause()
"""
PARENT = """
import os, signal, subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {started_by})
{then}
"""


@pytest.fixture
def parent_and_child(tmp_path, start_script):
    """Starts a process that starts CHILD."""

    def start(without_kernel: str, started_by: str, then: str):
        (tmp_path / "child.py").write_text(CHILD.format(without_kernel=without_kernel))
        (tmp_path / "parent.py").write_text(PARENT.format(started_by=started_by, then=then))
        return start_script(tmp_path / "parent.py", tmp_path / "child.py", ROOT, tmp_path / "child")

    return start


OURS = "{'MINIMIND_STARTED_BY': str(os.getpid())}"


def test_where_the_kernel_cannot_tell_the_process_asks(parent_and_child, tmp_path):
    """As on macOS."""
    without_kernel = "orphans.signal_when_parent_dies = lambda number: False"
    process = parent_and_child(without_kernel, OURS, "signal.pause()")
    wait_until(process, (tmp_path / "child").exists)
    process.kill()
    wait_for_end(process)


def test_a_launcher_that_is_not_the_parent_is_gone(parent_and_child, tmp_path):
    """Also where orphans come to a process that is Python."""
    process = parent_and_child("", "{'MINIMIND_STARTED_BY': '1'}", "os.wait()")
    wait_for_end(process)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize("left_behind", ["{}", "{'TORCHELASTIC_RUN_ID': 'x'}"])
def test_a_run_outlives_its_shell(parent_and_child, tmp_path, left_behind):
    process = parent_and_child("", left_behind, "")
    assert process.wait(60) == 0
    while not (tmp_path / "child").exists():
        assert processes_of(process)


def test_process_1_may_be_the_launcher():
    """As in a container, which it is the command of."""
    assert orphans.is_python(os.getpid())
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert not orphans.is_python(other.pid)
