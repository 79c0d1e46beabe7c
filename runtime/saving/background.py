"""Saves in the middle of a run: written in order, one thread a job, while training goes on."""

import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from runtime.saving import store
from runtime.saving.validity import raise_not_saved

SHARE = 0.05  # of a core: what a thread takes where training needs them all and nobody waits

# "rests": training runs on the CPU and needs its cores; "collective": jobs write together with
# those of other ranks; "last": the newest job's thread; "rested": its CPU time at its last rest
state: dict = {"rests": False, "collective": False, "last": None, "rested": 0.0}
_problems: list[Exception] = []
_hurry = threading.Event()  # somebody waits
_buffers: dict[str, Tensor] = {}  # the copies on the CPU, the same memory at every save


# --------------------------------------------------------------------------------------------------
# Jobs
# --------------------------------------------------------------------------------------------------


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
    """See `checkpoint.wait`."""
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


# --------------------------------------------------------------------------------------------------
# A checkpoint as a job
# --------------------------------------------------------------------------------------------------


def snapshot(tensors: dict[str, Tensor], run: dict) -> tuple[dict[str, Tensor], dict]:
    """Tensors and counters as they are now, in the memory of the CPU."""
    state["rests"] = next(iter(tensors.values())).device.type == "cpu"
    return copy_tensors(tensors), copy.deepcopy(run)


def copy_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors alone; the next copy is made in the same memory."""
    for name, tensor in tensors.items():
        if name not in _buffers:
            _buffers[name] = torch.empty_like(tensor, device="cpu")
        _buffers[name].copy_(tensor)
    return {name: _buffers[name] for name in tensors}


def write(folder: Path, keep: int, tensors: dict[str, Tensor], run: dict) -> None:
    """As `checkpoint.write`, at a pace that leaves the cores to training."""
    files: dict[str, dict] = {}
    step = run["progress"]["step"]
    try:
        with store.new_checkpoint(folder, step, keep, files) as building:
            store.write_tensors(building, tensors, throttled_planner())
            store.save_file(building / "run.pt", run)
            files |= {path.name: store.describe(path, throttle) for path in building.iterdir()}
    except BaseException as error:
        raise_not_saved(folder, step, error)
        raise


def throttled_planner():
    """For `store.write_tensors`: rests before each tensor."""
    from torch.distributed.checkpoint import DefaultSavePlanner  # here, as it takes a second

    class ThrottledPlanner(DefaultSavePlanner):
        def resolve_data(self, item):  # is called for each part of a tensor before it is written
            throttle()
            return super().resolve_data(item)

    return ThrottledPlanner()
