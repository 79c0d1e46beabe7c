"""Every few seconds each rank says that it lives and what it does: one that is stuck is named.

Ranks beat in the job's store, over connections of their own. Rank 0 listens to all others and they
to rank 0; while that is silent, they listen to each other, and the lowest that lives speaks. What a
rank does is read off the stack of its main thread, so that a step costs nothing for it.

There are two threads, since a store in a process that is stopped never answers: one talks to the
store, the other one looks at what was heard, and when.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from runtime.folders import CODE, ROOT
from runtime.launcher import Launch, read_launch
from runtime.process import faults

INTERVAL = float(os.environ.get("MINIMIND_HEARTBEAT", 5))  # seconds between beats; tests have less
SILENT = 5 * INTERVAL  # without a beat, and a rank is called silent
STUCK = 8 * INTERVAL  # in which no rank has moved, and it is said where they are
GRACE = 4 * INTERVAL  # that collectives wait beyond --timeout: who is silent shall be named before
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in CODE)
PLUMBING = ("wrapper", "run", "main", "<module>", "<lambda>")  # functions that say nothing

_current: dict = {"progress": {}}  # the counters of the run, the Heartbeat


def start(minutes: float) -> timedelta:
    """Begin to beat and to listen, before this process joins its process group.

    Args:
        minutes: of silence after which the job ends: --timeout.

    Returns:
        How long a collective may wait. It becomes torch's default, too: groups that are made by
        `init_device_mesh` and by libraries cannot be given any other way.
    """
    limit = timedelta(minutes=minutes, seconds=GRACE)
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit
    heartbeat = Heartbeat(read_launch(), minutes, faults.tell_launcher)
    faults.explain_timeout = heartbeat.explain_timeout
    _current["heartbeat"] = heartbeat
    for target in (heartbeat.talk, heartbeat.watch):
        threading.Thread(target=target, daemon=True).start()
    if not heartbeat.has_store:  # torch would try in vain, too, but say it in hundreds of lines
        heartbeat.reached.wait()
    return limit


def follow(progress: dict) -> None:
    """From now on say which step a rank is in. Args: progress: counters, with `step`."""
    _current["progress"] = progress


def stop() -> None:
    """Say that this rank has ended as it should: its silence is none."""
    if "heartbeat" in _current:
        _current["heartbeat"].stop()


@dataclass
class Peer:
    """What is known of another rank.

    Attributes:
        heard: when its last beat came, or this process began to listen; None while it does not.
        beat: the last one, None before the first.
    """

    heard: float | None = None
    beat: dict | None = None

    def silent_for(self, now: float) -> float:
        """Seconds; 0 for a rank that has ended, or is not listened to."""
        heard = self.heard  # the other thread may change it
        return 0.0 if heard is None or self.has_ended() else now - heard

    def has_ended(self) -> bool:
        return self.beat is not None and self.beat["ended"]

    def is_gone(self, now: float) -> bool:
        return self.has_ended() or self.silent_for(now) >= SILENT


@dataclass
class Trouble:
    """Something to say.

    Attributes:
        seconds: for which it has lasted.
        ends: whether it ends the job when it has lasted for --timeout.
        is_told: False where another rank says it, too.
    """

    seconds: float
    text: str
    ends: bool = True
    is_told: bool = True


class Heartbeat:
    """The beat of this process, and what it hears."""

    def __init__(
        self, launched: Launch, minutes: float, report: Callable[[Exception, str], None]
    ) -> None:
        self.rank = launched.rank
        self.minutes = minutes
        self.report = report
        self.host = socket.gethostname()
        self.began = time.monotonic()
        # The store is in torchrun, or where that says so, and under other launchers, in rank 0.
        self.address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self.of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.has_store = self.rank == 0 and not self.of_launcher
        # Of what all ranks see, one on each host speaks; on rank 0's, that may be stopped, another.
        self.speaks_for_host = launched.local_rank == 0 or self.rank == 1
        self.peers = {rank: Peer() for rank in range(launched.world_size) if rank != self.rank}
        self.answered: float | None = None  # when the store did last; None until it is reached
        self.problem = "no answer"  # why it is not reached
        self.number = 0  # of beats
        self.place = ""  # what the main thread does,
        self.since = self.began  # and since when
        self.reached = threading.Event()
        self.stopping = threading.Event()
        self.stopped = threading.Event()

    # ---------------------------------------------------------------------------------------------
    # The thread that talks to the store
    # ---------------------------------------------------------------------------------------------

    def talk(self) -> None:
        try:
            store = self.connect()
            while not self.stopping.is_set():
                self.beat(store)
                self.listen(store)
                self.answered = time.monotonic()
                self.stopping.wait(INTERVAL)
            if store is not None:
                self.say_goodbye(store)
        except (RuntimeError, OSError):  # who has the store has ended, and the job with it
            self.stopping.set()
        self.stopped.set()

    def connect(self) -> dist.Store | None:
        """A connection to the store as soon as it is there. On rank 0 that keeps it alive, too."""
        while not self.stopping.is_set():
            try:
                socket.create_connection(self.address, timeout=SILENT).close()
            except (OSError, UnicodeError) as error:
                self.problem = getattr(error, "strerror", None) or str(error)
                self.stopping.wait(INTERVAL / 10)
                continue
            self.problem = "what answers there is none"
            self.reached.set()
            limit = timedelta(minutes=self.minutes)
            options = {"is_master": self.has_store, "multi_tenant": True, "wait_for_workers": False}
            return dist.TCPStore(*self.address, timeout=limit, **options)
        return None

    def beat(self, store: dist.Store, ended: bool = False) -> None:
        now, place = time.monotonic(), main_thread_place()
        if place != self.place:
            self.place, self.since = place, now
        self.number += 1
        beat = {
            "number": self.number,
            "host": self.host,
            "process": (os.getpid(), start_time(os.getpid())),
            "place": place,
            "still": now - self.since,
            "ended": ended,
        }
        store.set(key(self.rank), json.dumps(beat))

    def listen(self, store: dist.Store) -> None:
        """Hear rank 0; on rank 0, or while that is gone, all others."""
        now = time.monotonic()
        for rank, peer in self.peers.items():
            if rank and self.rank and not self.peers[0].is_gone(now):
                peer.heard = None
            elif peer.heard is None:
                peer.heard = now
        heard = [rank for rank, peer in self.peers.items() if peer.heard is not None]
        heard = [rank for rank in heard if self.peers[rank].beat or store.check([key(rank)])]
        for rank, value in zip(heard, store.multi_get([key(rank) for rank in heard]), strict=True):
            peer, beat = self.peers[rank], json.loads(value)
            if peer.beat is None or beat["number"] != peer.beat["number"]:
                peer.beat, peer.heard = beat, time.monotonic()

    def stop(self) -> None:
        self.stopping.set()
        self.stopped.wait(3)  # the store may be gone

    def say_goodbye(self, store: dist.Store) -> None:
        """The last beat. Who has the store waits a moment for the last beats of the others."""
        self.beat(store, ended=True)
        if self.has_store:
            end = time.monotonic() + 2
            while time.monotonic() < end and not all(p.has_ended() for p in self.peers.values()):
                self.listen(store)
                time.sleep(0.01)

    # ---------------------------------------------------------------------------------------------
    # The thread that looks at what was heard
    # ---------------------------------------------------------------------------------------------

    def watch(self) -> None:
        said = {}  # of each subject: the seconds after which to speak of it again
        looked = time.monotonic()
        while not self.stopping.wait(INTERVAL):
            now = time.monotonic()
            if now - looked > 3 * INTERVAL:  # this process was stopped itself, and heard nothing
                self.forget_silence(now)
            looked = now
            troubles = self.troubles(now)
            for subject in said.keys() - troubles.keys():
                if subject[0] == "silent":
                    write(f"rank {subject[1]} beats again")
                del said[subject]
            for subject, trouble in troubles.items():
                if trouble.ends and trouble.seconds >= 60 * self.minutes:
                    self.end(f"{trouble.text}; the job ends (--timeout {self.minutes:g})")
                if trouble.is_told and trouble.seconds >= said.get(subject, 0):
                    write(trouble.text)
                    said[subject] = 2 * trouble.seconds

    def forget_silence(self, now: float) -> None:
        for peer in self.peers.values():
            peer.heard = None if peer.heard is None else now
        self.answered = None if self.answered is None else now

    def end(self, text: str) -> None:
        """End this process; its launcher ends the others. What was saved is whole at any moment."""
        write(f"error: {text}")
        self.report(RuntimeError(text), text)
        for peer in self.peers.values():
            is_silent = peer.silent_for(time.monotonic()) >= SILENT
            if is_silent and peer.beat and peer.beat["host"] == self.host:
                kill(*peer.beat["process"])
        os._exit(1)

    def troubles(self, now: float) -> dict[tuple, Trouble]:
        """What there is to say now, by subject."""
        seconds = now - (self.began if self.answered is None else self.answered)
        if seconds >= SILENT:
            return self.no_answer(seconds)
        if self.answered is None:
            return {}
        if any(rank < self.rank and not peer.is_gone(now) for rank, peer in self.peers.items()):
            return {}  # a lower rank speaks
        silent = {rank: peer.silent_for(now) for rank, peer in self.peers.items()}
        troubles = {
            ("silent", rank): Trouble(seconds, silence(rank, self.peers[rank], seconds))
            for rank, seconds in silent.items()
            if seconds >= SILENT
        }
        return troubles or self.stuck(now)

    def no_answer(self, seconds: float) -> dict[tuple, Trouble]:
        address, is_told = "{}:{}".format(*self.address), self.speaks_for_host
        if self.answered is None:
            text = (
                f"rank {self.rank} on {self.host} cannot reach the job's store at {address} for "
                f"{span(seconds)} ({self.problem}): is rank 0 running there, are MASTER_ADDR and "
                "MASTER_PORT right, is the port open?"
            )
            return {("store",): Trouble(seconds, text, is_told=is_told)}
        first = self.peers.get(0, Peer())
        if first.beat and not self.of_launcher:
            return {("silent", 0): Trouble(seconds, silence(0, first, seconds), is_told=is_told)}
        text = f"the job's store at {address} has given no answer for {span(seconds)}"
        return {
            ("store",): Trouble(seconds, f"{text}: is torchrun there stopped?", is_told=is_told)
        }

    def stuck(self, now: float) -> dict[tuple, Trouble]:
        """Ranks that wait for each other at different places; collectives time out themselves."""
        beats = [peer.beat for peer in self.peers.values() if not peer.has_ended()]
        if None in beats or not beats:
            return {}
        seconds = min(now - self.since, *(beat["still"] for beat in beats))
        if seconds < STUCK or {beat["place"] for beat in beats} == {self.place}:
            return {}
        text = f"no rank has moved for {span(seconds)}: {self.describe_ranks()}"
        return {("stuck",): Trouble(seconds, text, ends=False)}

    def explain_timeout(self) -> str:
        waited = span(60 * self.minutes)
        return f"waited for other ranks for {waited} (--timeout): {self.describe_ranks()}"

    def describe_ranks(self) -> str:
        """Where they are that this process listens to, and itself; where fewer are comes first."""
        ranks_of: dict[tuple[str, str], list[int]] = {(self.host, self.place): [self.rank]}
        for rank, peer in self.peers.items():
            if peer.heard is not None and not peer.has_ended():
                beat = peer.beat or {"host": "?", "place": "not joined"}
                ranks_of.setdefault((beat["host"], beat["place"]), []).append(rank)
        groups = sorted(ranks_of.items(), key=lambda group: (len(group[1]), self.rank in group[1]))
        texts = [
            f"rank {', '.join(map(str, sorted(ranks)))} on {host} is in {place}"
            for (host, place), ranks in groups
        ]
        return "; ".join(texts[:4] + ["..."] * (len(texts) > 4))


def silence(rank: int, peer: Peer, seconds: float) -> str:
    if peer.beat is None:
        missing = f"rank {rank} has not joined the job for {span(seconds)}"
        return f"{missing}: was it started, and can it reach MASTER_ADDR?"
    return (
        f"rank {rank} on {peer.beat['host']} has been silent for {span(seconds)}: its process is "
        f"stopped or gone, or its host is down; last it was in {peer.beat['place']}"
    )


def kill(number: int, started: str) -> None:
    """End a stopped process of this job. Its launcher would wait for it as for one that saves."""
    try:
        if started and start_time(number) == started:  # else another process has got its number
            os.kill(number, signal.SIGKILL)
    except OSError:
        pass


def start_time(number: int) -> str:
    """When a process began, in ticks; '' where there is no /proc."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def key(rank: int) -> str:
    return f"heartbeat/{rank}"


def span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def write(text: str) -> None:
    """A line on stderr, past Python's buffers: a fork that found their locks held would hang."""
    try:
        os.write(2, f"{text}\n".encode(errors="replace"))
    except OSError:  # nobody reads it any more
        pass


def main_thread_place() -> str:
    """Our functions that the main thread is in, what the last of them called, and the line."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    names, line, called = [], "", ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(OURS):
            line = line or f" ({os.path.basename(path)}:{frame.f_lineno})"
            names += [name] if name not in PLUMBING else []
        elif not names and name not in PLUMBING and not line:
            called = name
        frame = frame.f_back
    names = names[::-1] if len(names) <= 3 else [*names[:-3:-1], "...", names[0]]
    names += [called] if called else []
    progress = _current["progress"]
    step = f"step {progress['step'] + 1}, " if progress else ""
    return f"{step}{' > '.join(names) or 'its start'}{line}"
