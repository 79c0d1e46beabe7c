"""Checkpoints in another engine's own format, in our store: each is whole, or it is not there.

    checkpoints/step_00000100/engine          what the engine wrote: a file or a folder
    checkpoints/step_00000100/run.pt          counters, scaler, generators, identity of the run
    checkpoints/step_00000100/manifest.json   size and SHA-256 of every file, written last

An engine's files are read by that engine alone; the identity of the run names it.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from runtime import checkpoint, store
from runtime.parallel import gather_objects, world


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
        identity: what `store.check_identity` compares at a resume; names the engine.
        write: has the engine write at a place, where it makes a file or a folder; is called on every rank.
        scaler: None where the engine saves its own.

    Raises:
        OSError: it could not be written, or the weights before it; says which checkpoint is still good.
    """
    checkpoint.wait()
    folder, step, first = folder / "checkpoints", progress["step"], world()[0] == 0
    building = folder / f".tmp-step_{step:08d}"
    run = {"progress": progress, "identity": identity, "scaler": scaler.state_dict() if scaler else {}}
    run["rng"] = gather_objects(checkpoint.rng_state())
    try:
        if first:
            store.begin(folder, step)
        barrier()
        write(building / "engine")
        barrier()
        if first:
            store.save_file(building / "run.pt", run)
            files = {str(path.relative_to(building)): path for path in sorted(building.rglob("*")) if path.is_file()}
            for path in files.values():
                flush(path)
            store.finish(building, step, {name: store.describe(path) for name, path in files.items()}, keep)
    except (OSError, RuntimeError, CheckpointException) as error:
        if first:
            store.clean(folder)
        last = next((c.name for c in store.list_checkpoints(folder) if not store.fault(c)), "")
        advice = f"{last} is intact: make room and go on with --resume auto" if last else "none was saved before"
        problem = f"cannot save the checkpoint of step {step} in {folder}: {checkpoint.reason(error)}"
        raise OSError(f"{problem}; {advice}") from error


def load(found: Path | None, scaler: torch.amp.GradScaler | None = None) -> dict:
    """Put back what is ours of a checkpoint: counters, scaler, generators. Its engine reads the rest.

    On another number of ranks the generators cannot be those of before; they then go on from the current seed.

    Returns:
        The counters that were saved; zeros for a new run.
    """
    if found is None:
        return checkpoint.load_run(None, None, None, None)
    run = torch.load(found / "run.pt", map_location="cpu", weights_only=True)
    if run["scaler"] and scaler is not None and scaler.is_enabled():
        scaler.load_state_dict(run["scaler"])
    rank, world_size = world()
    if len(run["rng"]) == world_size:
        checkpoint.set_rng_state(run["rng"][rank])
    if rank == 0:
        print(f"resumed from {found} behind step {run['progress']['step']}", flush=True)
    return run["progress"]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def flush(path: Path) -> None:
    """Bring to the disk what another program wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
