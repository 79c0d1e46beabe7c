"""A rank that is stopped, stuck or missing is named with its host and what it did last, and ends
the job in time."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time

import pytest
from conftest import RUN_FLAGS, conversations, curve, write_jsonl
from running import (
    ROOT,
    free_port,
    launched_as,
    processes_of,
    start_ranks,
    wait_for_steps,
    wait_until,
)

from runtime.distributed import heartbeat
from runtime.distributed.heartbeat import INTERVAL, SILENT, STUCK, Heartbeat, Peer
from runtime.launcher import Launch

SFT = "trainer/train_full_sft.py"
HOST = socket.gethostname()
QUICK = {"MINIMIND_HEARTBEAT": "0.2", "OMP_NUM_THREADS": "1"}  # a second without a beat is silence
SECONDS = "--timeout=0.1"  # six


@pytest.fixture
def flags(tmp_path) -> list[str]:
    data = write_jsonl(tmp_path / "data.jsonl", conversations(90))
    fixed = [
        *RUN_FLAGS,
        f"--data_path={data}",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--out_dir={tmp_path / 'out'}",
    ]
    return [
        *fixed,
        "--from_weight=none",
        "--ddp",
        "--batch_size=1",
        "--save_interval=0",
        "--epochs=999",
    ]


@pytest.fixture
def ranks(tmp_path):
    """ranks(*words) -> two processes, and a function that gives what rank N has printed."""
    started = []

    def start(*words: str) -> tuple:
        folder = tmp_path / "ranks"
        folder.mkdir()
        started.extend(start_ranks(*words, nproc=2, folder=folder, env=QUICK))
        return started, lambda rank: (folder / str(rank)).read_text(errors="replace")

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(process, condition) -> None:
    """Wait for something that a rank does; it must not end before."""
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {process.wait(0.05)}")


def steps(folder) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("out/*/metrics.jsonl"))


# --------------------------------------------------------------------------------------------------
# Real processes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [0, 1])  # rank 0 has the store, which is silent with it
def test_a_stopped_rank_is_named_and_ends_the_job(flags, tmp_path, ranks, stopped):
    processes, printed = ranks(SFT, *flags, "--max_steps=99999", SECONDS)
    wait_for(processes[0], lambda: steps(tmp_path) > 2)
    os.kill(processes[stopped].pid, signal.SIGSTOP)
    code = processes[1 - stopped].wait(240)
    told = printed(1 - stopped)
    assert code == 1, told
    silent = (
        rf"rank {stopped} on {HOST} has been silent for \d+ s: .* last it was in .*\(\w+\.py:\d+\)"
    )
    assert re.search(rf"^{silent}$", told, re.MULTILINE), told
    assert re.search(rf"^error: {silent}; the job ends \(--timeout 0.1\)$", told, re.MULTILINE), (
        told
    )
    assert "Traceback" not in told
    assert processes[stopped].wait(240) == -signal.SIGKILL


def test_a_rank_that_goes_on_in_time_was_never_away(flags, tmp_path, start_script):
    """Under torchrun, which has the store."""
    process = start_script(SFT, *flags, "--max_steps=100", nproc=2, env=QUICK)
    wait_for_steps(process, tmp_path / "out", 3)
    (rank,) = processes_of(process, "RANK=0")
    os.kill(rank, signal.SIGSTOP)
    wait_until(process, lambda: f"rank 0 on {HOST} has been silent" in process.log.read_text())
    os.kill(rank, signal.SIGCONT)
    assert process.wait(240) == 0, process.log.read_text()
    (run,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert [line["step"] for line in curve(run)] == [*range(1, 101)]
    assert "error" not in process.log.read_text()


def test_a_rank_that_is_stuck_is_named_with_its_place(flags, tmp_path, ranks):
    """Its process lives and beats: a file system that hangs."""
    processes, printed = ranks(
        "tests/sabotage.py", "hang", "1", ROOT / SFT, *flags, "--max_steps=9", SECONDS
    )
    code = processes[0].wait(240)
    told = printed(0)
    assert code == 1, told
    place = rf"rank 1 on {HOST} is in step 3, train_epoch > sft_loss > .*\(lm\.py:\d+\); "
    place += f"rank 0 on {HOST} is in step 3, "
    assert re.search(rf"^no rank has moved for \d+ s: {place}", told, re.MULTILINE), told
    assert re.search(
        rf"^error: waited for other ranks for 6 s \(--timeout\): {place}", told, re.MULTILINE
    ), told
    assert "Traceback" not in told and "silent" not in told


@pytest.mark.parametrize(
    "rank, told", [(0, "rank 1 has not joined the job"), (1, f"rank 1 on {HOST} cannot reach ")]
)
def test_a_job_that_does_not_come_together_says_who_is_missing(flags, run_script, rank, told):
    port = free_port()
    done = run_script(SFT, *flags, SECONDS, env=QUICK | launched_as(rank, 2, port))
    assert done.returncode == 1 and not done.stdout
    *lines, last = done.stderr.splitlines()
    assert lines and all(line.startswith(told) for line in lines), done.stderr  # none of torch's
    assert last.startswith(f"error: {told}") and last.endswith("; the job ends (--timeout 0.1)")
    assert (
        rank == 0
        or f"127.0.0.1:{port} " in last
        and "Connection refused" in last
        and "MASTER_ADDR" in last
    )


GROUPS = """
import runtime.distributed.heartbeat as heartbeat, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
limit = heartbeat.start(7.0)
dist.init_process_group("gloo", timeout=limit)
groups = [dist.group.WORLD, dist.new_group(), init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b")).get_group("b")]
print([group._get_backend(torch.device("cpu")).options._timeout == limit for group in groups], limit)
heartbeat.stop()
"""


def test_every_group_has_the_time_out(tmp_path, run_script):
    """Also those that libraries make."""
    (tmp_path / "groups.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{GROUPS}")
    done = run_script(tmp_path / "groups.py", env=launched_as(0, 1, free_port()))
    assert done.stdout == "[True, True, True] 0:07:20\n", done.stderr


@pytest.mark.parametrize(
    "value, said", [("0", "must be positive"), ("nan", "must be"), ("1e300", "at most 525,600")]
)
def test_time_outs_that_make_no_sense(run_script, value, said):
    done = run_script(SFT, f"--timeout={value}")
    assert done.returncode == 2 and re.fullmatch(rf"error: --timeout .*{said}.*\n", done.stderr), (
        done.stderr
    )


# --------------------------------------------------------------------------------------------------
# What is said when
# --------------------------------------------------------------------------------------------------

NOW = 1000.0


@pytest.fixture
def heard(monkeypatch):
    """heard(rank, {other: (seconds since its beat, its place, seconds it is there, ended)}) -> what
    that rank says."""
    for name, value in launched_as(0, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def heard(rank: int, others: dict, answered=0.0) -> list[str]:
        beating = Heartbeat(
            Launch(True, rank, rank, len(others) + 1, 4), 30.0, lambda error, text: None
        )
        beating.answered, beating.place, beating.since = NOW - answered, "all_reduce", NOW - 999
        for other, state in others.items():
            if state is not None:
                ago, place, still, ended = state
                beat = {
                    "number": 1,
                    "host": f"host{other}",
                    "place": place,
                    "still": still,
                    "ended": ended,
                }
                beating.peers[other] = Peer(NOW - ago, beat)
            else:
                beating.peers[other] = Peer(NOW - 999)
        return [trouble.text for trouble in beating.troubles(NOW).values() if trouble.is_told]

    return heard


MOVES = (INTERVAL, "train_epoch", INTERVAL, False)
STOPPED = (SILENT + 1, "train_epoch", 0.0, False)


def test_the_lowest_rank_that_lives_speaks(heard):
    (told,) = heard(0, {1: MOVES, 2: STOPPED})
    assert told.startswith("rank 2 on host2 has been silent for ")
    assert heard(1, {0: MOVES, 2: STOPPED}) == [] and heard(2, {0: STOPPED, 1: MOVES}) == []
    assert (
        len(heard(1, {0: STOPPED, 2: MOVES})) == 1 and len(heard(2, {0: STOPPED, 1: STOPPED})) == 2
    )
    (told,) = heard(0, {1: MOVES, 2: None})
    assert told.startswith("rank 2 has not joined the job for ")


def test_a_rank_that_has_ended_is_not_silent(heard):
    assert heard(0, {1: (999.0, "main", 999.0, True), 2: MOVES}) == []
    assert len(heard(1, {0: (999.0, "main", 999.0, True), 2: STOPPED})) == 1


def test_a_rank_that_works_for_long_is_not_called_silent(heard):
    """Others wait for rank 1, and are told for what; where it moves, nothing is said."""
    waits = (INTERVAL, "all_reduce", STUCK + 1, False)
    (told,) = heard(0, {1: (INTERVAL, "tokenise", STUCK + 1, False), 2: waits})
    assert told.startswith("no rank has moved for ") and "rank 1 on host1 is in tokenise; " in told
    assert heard(0, {1: (INTERVAL, "tokenise", STUCK - 1, False), 2: waits}) == []
    assert heard(0, {1: waits, 2: waits}) == []  # in one place: a long step


def test_a_store_that_gives_no_answer(heard):
    (told,) = heard(0, {1: MOVES}, answered=SILENT + 1)
    assert re.match("the job's store at 127.0.0.1:29500 has given no answer for ", told)


def test_a_process_that_was_stopped_itself_does_not_take_the_others_for_silent(heard, monkeypatch):
    beating = Heartbeat(Launch(True, 0, 0, 2, 2), 0.001, lambda error, text: pytest.fail(text))
    long_ago = time.monotonic() - 999
    beating.peers[1], beating.answered = (
        Peer(long_ago, {"place": "", "ended": False, "still": 0.0}),
        long_ago,
    )
    times = iter([False, True])
    beating.stopping.wait = lambda seconds: next(times)
    clock = iter([long_ago, time.monotonic()])
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(heartbeat, "write", pytest.fail)
    beating.watch()


def test_what_the_main_thread_does():
    heartbeat.follow({"step": 4})
    place = heartbeat.main_thread_place()
    heartbeat.follow({})
    assert re.fullmatch(r"step 5, main_thread_place \(heartbeat\.py:\d+\)", place)
