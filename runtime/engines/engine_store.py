"""Checkpoints in another engine's own format, in our store: each is whole, or it is not there.

    checkpoints/step_00000100/engine          what the engine wrote: a file or a folder
    checkpoints/step_00000100/run.pt          counters, scaler, generators, identity of the run
    checkpoints/step_00000100/manifest.json   size and SHA-256 of every file, written last

An engine's files are read by that engine alone; the identity of the run names it.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from runtime import checkpoint
from runtime.device import is_sharded
from runtime.ranks import gather_objects, world
from runtime.saving import store
from runtime.saving.validity import raise_not_saved


def save(
    folder: Path,
    keep: int,
    progress: dict,
    identity: dict,
    write: Callable[[Path], None],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Save a checkpoint of the whole run. Every rank calls it at the same step; training waits.

    Args:
        folder: the run's, `out/full_sft_512`.
        keep: checkpoints that stay.
        progress: counters, with `step`.
        identity: what `identity.check_identity` compares at a resume; names the engine.
        write: has the engine write at a place, where it makes a file or a folder; is called on
            every rank.
        scaler: None where the engine saves its own.

    Raises:
        OSError: it could not be written, or the weights before it; says which checkpoint is still
            good.
    """
    checkpoint.wait()
    folder, step, first = folder / "checkpoints", progress["step"], world()[0] == 0
    place = contextlib.nullcontext(folder / f".tmp-step_{step:08d}")
    files: dict[str, dict] = {}
    if first:
        place = store.new_checkpoint(folder, step, keep, files)
    run = {
        "progress": progress,
        "identity": identity,
        "scaler": scaler.state_dict() if scaler else {},
    }
    run["rng"] = gather_objects(checkpoint.rng_state())
    try:
        with place as building:
            barrier()
            write(building / "engine")
            barrier()
            if first:
                store.save_file(building / "run.pt", run)
                paths = (path for path in sorted(building.rglob("*")) if path.is_file())
                files |= {str(path.relative_to(building)): seal(path) for path in paths}
    except BaseException as error:
        raise_not_saved(folder, step, error)
        raise


def seal(path: Path) -> dict:
    """Bring to the disk what an engine wrote to a file; its size and hash.

    Windows syncs only what is open for writing.
    """
    is_windows = not hasattr(os, "O_DIRECTORY")
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return store.describe(path)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def whole_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict on the CPU with every tensor whole, on rank 0; elsewhere empty.

    Every rank calls it.

    One tensor at a time is put together, so that no other process ever holds the whole model.
    """
    whole = {}
    for name, value in state_dict.items():
        value = value.full_tensor() if is_sharded(value) else value
        if world()[0] == 0:
            whole[name] = value.to("cpu", copy=True)
    return whole
