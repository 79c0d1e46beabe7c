"""SIGHUP with real processes: ignored it stays ignored, as under nohup; otherwise the run saves and
stops."""

import contextlib
import os
import pty
import signal
import subprocess
import sys

import pytest
from conftest import chat, write_jsonl
from running import ROOT, kill_all, processes_of, start, wait_for_steps

from runtime import launch
from runtime.saving import rotation, validity

NAME = "full_sft_32"


@pytest.fixture
def job(tmp_path, tiny_flags):
    """Flags of a run that goes on until it is stopped, and saves only then."""
    data = write_jsonl(
        tmp_path / "data.jsonl", [chat(f"say {n}", "it " * (n % 7 + 1)) for n in range(50)]
    )
    places = [
        f"--data_path={data}",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--out_dir={tmp_path / 'out'}",
    ]
    more = (
        "--max_seq_len=64 --packing=0 --epochs=10000 --log_interval=1 --save_interval=0"
        " --from_weight=none"
    )
    return [*tiny_flags, *places, *more.split()]


@contextlib.contextmanager
def nohup():
    """What is started in here has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def steps_of(out) -> int:
    return (out / NAME / "metrics.jsonl").read_text().count("\n")


def check_saved(out) -> None:
    """The checkpoint of the last step is there, alone, and whole."""
    (saved,) = rotation.list_checkpoints(out / NAME / "checkpoints")
    assert saved.name == f"step_{steps_of(out):08d}" and validity.fault(saved) == ""


COMMANDS = {
    "one process": ["main.py", "--algorithm", "sft"],
    "two by the launcher": ["scripts/run_distributed.py", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_ignored_hangup_stays_ignored(start_script, job, tmp_path, name):
    """Whoever gets it: the launcher, torchrun under it, a rank, a process that reads data."""
    with nohup():
        process = start_script(*COMMANDS[name], *job, "--num_workers=1")
    wait_for_steps(process, tmp_path / "out", 3)
    for number in processes_of(process):
        os.kill(number, signal.SIGHUP)
    wait_for_steps(process, tmp_path / "out", steps_of(tmp_path / "out") + 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 143, process.log.read_text()
    check_saved(tmp_path / "out")


def test_torchrun_that_hears_it_under_nohup_does_not_lose_the_run(start_script, job, tmp_path):
    """torchrun ends its workers then; they save before."""
    with nohup():
        process = start_script("trainer/train_full_sft.py", "--ddp", *job, nproc=2)
    wait_for_steps(process, tmp_path / "out", 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(240) == 1
    assert "stopped by signal 1 at step" in process.log.read_text()
    check_saved(tmp_path / "out")


def test_a_closed_terminal_takes_no_more_text(job, tmp_path):
    leader, follower = pty.openpty()
    words = ["trainer/train_full_sft.py", *job]
    process = start(
        words, None, None, ROOT, False, stdin=follower, stdout=follower, stderr=follower
    )
    process.log = tmp_path / "out" / NAME / "training.log"
    os.close(follower)
    try:
        wait_for_steps(process, tmp_path / "out", 3)
        os.close(leader)  # to write is an error from here on
        wait_for_steps(process, tmp_path / "out", steps_of(tmp_path / "out") + 3)
        process.send_signal(signal.SIGHUP)
        assert process.wait(240) == 129, process.log.read_text()
        check_saved(tmp_path / "out")
    finally:
        kill_all(process)


@pytest.fixture
def stop(monkeypatch):
    """A StopSignal that notes in `ended` how it would end the process, and leaves this process as
    it is."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    stop = launch.StopSignal()
    stop.ended = []
    monkeypatch.setattr(os, "_exit", stop.ended.append)
    return stop


def test_a_second_hangup_is_none(stop):
    """A closed terminal sends two, by its shell and by the kernel: that is nobody's impatience."""
    for number in (signal.SIGHUP, signal.SIGHUP):
        stop.receive(number, None)
    assert stop.received == signal.SIGHUP and not stop.ended
    stop.receive(signal.SIGTERM, None)
    assert stop.ended == [143]


def test_a_first_signal_does_not_interrupt_what_other_ranks_began(stop):
    """A rank saves because another one stops; the launcher's SIGTERM that follows is its first, not
    its second."""
    stop.sync_stop(float(signal.SIGTERM))
    stop.receive(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM and not stop.ended
    stop.receive(signal.SIGTERM, None)
    assert stop.ended == [143]


def test_what_one_rank_has_received_ends_no_loop_before_all_know(stop):
    """It may come between the sum of a step and the end of an epoch: one rank would leave, the
    others wait for it."""
    stop.receive(signal.SIGINT, None)
    assert (stop.received, stop.number) == (signal.SIGINT, 0)
    stop.sync_stop(0.0)  # the sum was made before
    assert stop.number == 0
    stop.sync_stop(float(signal.SIGINT))
    assert stop.number == signal.SIGINT


def test_a_reader_that_leaves_does_not_end_a_run(job, tmp_path):
    """`... | tee log`, and Ctrl-C ends tee first."""
    words = ["trainer/train_full_sft.py", *job, "--max_steps=60"]
    process = start(words, None, None, ROOT, False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while b" step 3/" not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.wait(240) == 0, process.stderr.read().decode()
        check_saved(tmp_path / "out")
    finally:
        kill_all(process)
        process.stderr.close()


def test_ranks_leave_together(monkeypatch):
    """torchrun takes the first rank that a signal has stopped for one that failed, and kills one
    that saves longer."""
    calls = []
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(launch.dist, "destroy_process_group", lambda: calls.append("destroy"))
    with pytest.raises(SystemExit) as end:
        launch.run(lambda: calls.append("saved") or 143)
    assert end.value.code == 143 and calls == ["saved", "barrier", "destroy"]
