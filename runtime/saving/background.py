"""One thread that writes what a run leaves, in order, while training goes on."""

import os
import queue
import threading
import time
from collections.abc import Callable

SHARE = 0.05  # of a core: what the thread takes where training needs them all and nobody waits

_jobs: queue.Queue = queue.Queue()
_problems: list[Exception] = []
_hurry = threading.Event()  # somebody waits
# "rests": training needs the cores; "collective": a job may wait for other ranks
_thread: dict = {"rests": False, "collective": False}


def submit(job: Callable, *args) -> None:
    """Have the writing thread call job(*args) behind everything it was given before."""
    if "thread" not in _thread:  # a daemon: a fault must not wait for it
        _thread["thread"] = threading.Thread(target=work, daemon=True)
        _thread["thread"].start()
    _jobs.put((job, args))


def wait() -> None:
    """Until all that was asked for is on the disk. The end of a run and the next save call it.

    Raises:
        OSError: something could not be written; says which checkpoint is still good.
    """
    finish()
    if _problems:
        problem = _problems[0]
        _problems.clear()
        raise problem


def finish() -> None:
    """As `wait`, without a word about what went wrong."""
    _hurry.set()
    _jobs.join()
    _hurry.clear()


def flush_on_error() -> None:
    """In a process that ends with a fault: finish what it writes, if no other rank is needed."""
    if not _thread["collective"]:
        finish()


def need_other_ranks() -> None:
    """Say that from now on jobs write together with those of other ranks."""
    _thread["collective"] = True


def share_cores(rests: bool) -> None:
    """Say whether training runs on the CPU and needs its cores: then the thread rests in between."""
    _thread["rests"] = rests


def throttle() -> None:
    """In the writing thread, between two pieces of work: rest in proportion to the last one.

    What the thread takes of the cores training lacks, whatever their priorities; so a save is
    spread over many steps, unless somebody waits.
    """
    if _thread["rests"]:
        _hurry.wait((time.thread_time() - _thread["rested"]) * (1 / SHARE - 1))
    _thread["rested"] = time.thread_time()


def work() -> None:
    """The writing thread, of the lowest priority: training has the processor when it wants it."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    except (AttributeError, OSError):
        pass
    while True:
        job, args = _jobs.get()
        _thread["rested"] = time.thread_time()
        try:
            if not _problems:
                job(*args)
        except Exception as error:
            _problems.append(error)
        finally:
            _jobs.task_done()
