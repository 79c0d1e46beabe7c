"""Which process of a job this is: a launcher says it in the environment, and only this file reads
it.

torchrun, `accelerate launch` and `deepspeed` all set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT:
what torch needs to join a process group. Some of them alone are no launch: schedulers and job
scripts leave such variables behind.

A process that a launcher started must not outlive it, whenever that is killed. It asks before the
imports that take seconds, so this file imports no more than a few modules of Python itself.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torch.distributed's env://
NUMBERS = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
}  # each with its least value


@dataclass(frozen=True)
class Launch:
    """This process among those of its job; the defaults are for one that no launcher started."""

    launched: bool = False
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def read_launch(needed_by: str = "") -> Launch:
    """What the launcher of this process says, or the defaults where none started it.

    Args:
        needed_by: a flag that cannot be had without a launcher.

    Raises:
        ValueError: a variable that is no number, numbers that contradict each other, or no launcher
            though it is needed.
    """
    numbers = {
        name: whole_number(name, least) for name, least in NUMBERS.items() if name in os.environ
    }
    missing = [name for name in NEEDED if not os.environ.get(name, "").strip()]
    if missing and needed_by:
        there = ", ".join(name for name in (*NEEDED, "LOCAL_RANK") if os.environ.get(name))
        left_behind = (
            f"; of what it sets there is {there}, but no {', '.join(missing)}" if there else ""
        )
        command = f"torchrun --nproc_per_node 2 {sys.argv[0]} {needed_by}"
        raise ValueError(f"{needed_by} needs a launcher: {command}{left_behind}")
    if missing:
        return Launch()
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= world_size:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE {world_size} in the environment: ranks go from 0 to"
            " size - 1"
        )
    local_rank, here = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", world_size)
    if local_rank >= here or here > world_size:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, LOCAL_WORLD_SIZE {here} and WORLD_SIZE {world_size} in"
            " the environment: each must be less than the next, the sizes may be equal"
        )
    port = whole_number("MASTER_PORT", 0)
    if port > 65535:
        raise ValueError(f"MASTER_PORT is {port} in the environment: it must lie in 0..65535")
    return Launch(True, rank, local_rank, world_size, numbers.get("LOCAL_WORLD_SIZE", 1))


def whole_number(name: str, least: int) -> int:
    """The value of a variable. ValueError: it is no whole number, or below `least`."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(
            f"{name} is {text!r} in the environment, which is no whole number from {least} on:"
            " unset it, or start with a launcher that sets it, such as torchrun"
        )
    return int(text)


def slurm_task() -> Launch:
    """This process among the tasks that srun started, or the defaults."""
    names = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID"}
    return Launch(
        **{field: whole_number(name, 0) for field, name in names.items() if name in os.environ}
    )


def forget_leftovers() -> None:
    """Without a launcher, take out of the environment what other libraries would take for one."""
    if not read_launch().launched:
        for name in (*NEEDED, *NUMBERS):
            os.environ.pop(name, None)


def is_quiet() -> bool:
    """Whether another process of this machine tells of the errors that all of them have."""
    try:
        return read_launch().local_rank > 0
    except ValueError:  # which is the error to tell of
        return False


# --------------------------------------------------------------------------------------------------
# The life of a launcher, which is the life of what it started
# --------------------------------------------------------------------------------------------------

STARTED_BY = (  # to a process that we start: the id of the one that must be its parent
    "MINIMIND_STARTED_BY"
)


def die_with_launcher() -> None:
    """Have this process killed when its launcher is: an orphan would train on beside the run's
    successor.

    Nothing happens where no launcher started it: a run outlives its shell. What this process starts
    is not meant.
    """
    watched = (
        "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ
    )  # torchrun, DeepSpeed's launcher
    watched = watched and all(os.environ.get(name) for name in NEEDED)
    launcher = os.environ.pop(STARTED_BY, None)
    if launcher is None and not watched:
        return
    parent = os.getppid()
    if launcher not in (None, str(parent)) or parent == 1 and not is_python(1):
        os._exit(1)  # it was killed before this process could ask
    if not signal_when_parent_dies(signal.SIGKILL):
        threading.Thread(target=watch_parent, args=[parent], daemon=True).start()
    if os.getppid() != parent:  # it was killed while we asked
        os._exit(1)


def is_python(process: int) -> bool:
    """Whether a process may be a launcher; process 1 is one in a container, elsewhere it takes in
    orphans."""
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return b"python" in file.read().split(b"\0")[0]
    except OSError:
        return sys.platform == "linux"  # no way to know


def signal_when_parent_dies(number: int) -> bool:
    """Ask the kernel for it; False where that cannot be had, which is everywhere but on Linux."""
    try:
        return ctypes.CDLL(None).prctl(1, number) == 0  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return False


def watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def become_launcher(parent: int) -> None:
    """In a process that is about to turn into a launcher: tell its ranks its id, and end with
    `parent`, by SIGTERM."""
    os.environ[STARTED_BY] = str(os.getpid())
    signal_when_parent_dies(signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
