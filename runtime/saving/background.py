"""What a run leaves is written in order, one thread a job, while training goes on."""

import contextlib
import os
import threading
import time
from collections.abc import Callable

SHARE = 0.05  # of a core: what a thread takes where training needs them all and nobody waits

# "rests": training runs on the CPU and needs its cores; "collective": jobs write together with
# those of other ranks; "last": the newest job's thread; "rested": its CPU time at its last rest
state: dict = {"rests": False, "collective": False, "last": None, "rested": 0.0}
_problems: list[Exception] = []
_hurry = threading.Event()  # somebody waits


def submit(job: Callable, *args) -> None:
    """Have a thread call job(*args) behind everything that was submitted before."""
    words = (state["last"], job, args)
    state["last"] = threading.Thread(target=work, args=words, daemon=True)  # ends with the process
    state["last"].start()


def work(before: threading.Thread | None, job: Callable, args: tuple) -> None:
    """A thread of the lowest priority: training has the processor when it wants it."""
    if before is not None:
        before.join()
    with contextlib.suppress(AttributeError, OSError):  # Windows has no priorities
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    state["rested"] = time.thread_time()
    try:
        if not _problems:
            job(*args)
    except Exception as error:
        _problems.append(error)


def throttle() -> None:
    """Between two pieces of work of a job: rest in proportion to the last one.

    What the thread takes of the cores training lacks, whatever their priorities; so a save is
    spread over many steps, unless somebody waits.
    """
    if state["rests"]:
        _hurry.wait((time.thread_time() - state["rested"]) * (1 / SHARE - 1))
    state["rested"] = time.thread_time()


def wait() -> None:
    """Until all that was asked for is on the disk. The end of a run and the next save call it.

    Raises:
        OSError: something could not be written; says which checkpoint is still good.
    """
    if state["last"] is not None:
        _hurry.set()
        state["last"].join()
        _hurry.clear()
    if _problems:
        raise _problems.pop()


def flush_on_error() -> None:
    """In a process that ends with a fault: finish what it writes, if no other rank is needed."""
    if not state["collective"]:
        with contextlib.suppress(Exception):  # the fault is what is told
            wait()
