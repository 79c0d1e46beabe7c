"""Saving a run while training goes on; what loads one is in `resume`.

Tensors are saved under the names of the parameters, and each process saves what it holds, in the
format of torch.distributed.checkpoint: so a checkpoint loads under another strategy and on another
number of processes. A save copies the tensors and leaves the rest to a thread.
"""

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.device import is_sharded
from runtime.ranks import gather_objects, world
from runtime.saving import background, store
from runtime.saving.background import submit, throttle, wait
from runtime.saving.identity import identity_of
from runtime.saving.run_state import COUNTERS, parts_of, rng_state, run_tensors
from runtime.saving.store import save_file

# Without a process group is what we mean.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)

__all__ = ["identity_of", "rng_state", "save_file", "submit", "wait"]

_buffers: dict[str, Tensor] = {}  # the copies on the CPU, the same memory at every save
_newest: dict[str, Path] = {}  # "checkpoint": the last one that this run saved or loaded


def save_run(
    folder: Path,
    keep: int,
    model,
    optimizer,
    scaler,
    progress: dict,
    identity: dict,
    own_tensors: bool = False,
) -> None:
    """Begin to save a checkpoint of the whole run; `wait` says how it went.

    Every rank calls it at the same step. Rank 0 writes what all ranks have; where the strategy
    shards, every rank writes its own.

    Args:
        folder: the run's, `out/full_sft_512`.
        keep: checkpoints that stay.
        progress: counters, with `step`.
        identity: what is compared at a resume, see `identity.identity_of`.
        own_tensors: ranks hold other tensors than rank 0, as in a pipeline; what several hold is
            written once.

    Raises:
        OSError: the save before this one failed.
    """
    wait()
    tensors = run_tensors(model, optimizer)
    background.share_cores(next(iter(tensors.values())).device.type == "cpu")
    run = {"scaler": scaler.state_dict(), "progress": progress, "identity": identity}
    run = copy.deepcopy(run) | {"rng": gather_objects(rng_state())}
    has_dtensors = any(map(is_sharded, tensors.values()))
    group = None
    if own_tensors or has_dtensors or any(hasattr(part, "optim") for part in parts_of(optimizer)):
        from runtime.distributed import sharded_save

        group = sharded_save.writing_group()
    if group is not None or world()[0] == 0:
        copied = sharded_save.stage(tensors) if has_dtensors else copy_tensors(tensors)
        submit(write, folder / "checkpoints", keep, copied, run, group)


def copy_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, in the memory of the CPU."""
    for name, tensor in tensors.items():
        if name not in _buffers:
            _buffers[name] = torch.empty_like(tensor, device="cpu")
        _buffers[name].copy_(tensor)
    return {name: _buffers[name] for name in tensors}


def write(
    folder: Path, keep: int, tensors: dict[str, Tensor], run: dict, group: dist.ProcessGroup | None
) -> None:
    """Write a checkpoint: all processes of `group` together, or this one alone."""
    import torch.distributed.checkpoint as dcp  # here, as it takes a second
    from torch.distributed.checkpoint.api import CheckpointException

    class ThrottledPlanner(dcp.DefaultSavePlanner):
        def resolve_data(self, item):  # is called for each part of a tensor before it is written
            throttle()
            return super().resolve_data(item)

    step, rank = run["progress"]["step"], world()[0]
    building = folder / f".tmp-step_{step:08d}"
    try:
        if rank == 0:
            store.begin(folder, step)
        if group is not None:
            dist.barrier(group)
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(building),
            planner=ThrottledPlanner(),
            process_group=group,
            no_dist=group is None,
        )
        files = {path.name: store.describe(path, throttle) for path in building.glob(f"__{rank}_*")}
        if group is not None:
            parts = [None] * group.size() if rank == 0 else None
            dist.gather_object(files, parts, group=group)
            files = {name: file for part in parts or () for name, file in part.items()}
        if rank == 0:
            save_file(building / "run.pt", run)
            files |= {name: store.describe(building / name) for name in (".metadata", "run.pt")}
            _newest["checkpoint"] = store.finish(building, step, files, keep)
    except (OSError, RuntimeError, CheckpointException) as error:
        if rank == 0:
            store.clean(folder)
        from runtime.saving.validity import not_saved

        raise not_saved(folder, step, error) from error


def save_weights(path: Path, state_dict: dict[str, Tensor], config: str, part: str = "") -> None:
    """Have the weights written as a plain state dict, their configuration beside them.

    All ranks call it. Sharded tensors are read back from the checkpoint of the `save_run` before
    this call: putting them together here would keep every rank from training.

    Args:
        path: of the weights, `out/full_sft_512.pth`.
        config: the JSON that goes beside it.
        part: of several models in one only that whose names begin so, without this beginning.
    """
    if world()[0] != 0:
        return
    state_dict = {
        name.removeprefix(part): value
        for name, value in state_dict.items()
        if name.startswith(part)
    }
    submit(save_file, path.with_suffix(".json"), config)
    if any(map(is_sharded, state_dict.values())):
        shapes = {name: value.shape for name, value in state_dict.items()}
        submit(write_saved_weights, path, shapes, part)
    else:
        copied = {name: value.to("cpu", copy=True) for name, value in state_dict.items()}
        submit(write_weights, path, copied)


def write_saved_weights(path: Path, shapes: dict[str, torch.Size], part: str) -> None:
    """Write the weights of the newest checkpoint; `part` as in `save_weights`."""
    from runtime.distributed import sharded_save

    write_weights(path, sharded_save.read_weights(_newest["checkpoint"], shapes, part))


def write_weights(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Write whole tensors of the CPU; a head that equals the embedding is saved once, tied to it."""
    head = state_dict.get("lm_head.weight")
    if head is not None and torch.equal(head, state_dict["model.embed_tokens.weight"]):
        state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    save_file(path, state_dict)


def find_run(
    folder: Path, source: str, identity: dict, accept: bool
) -> tuple[Path | None, dict[str, list]]:
    """The checkpoint that --resume (`source`) means and what differs from it; None for a new run.

    Raises:
        ValueError: on every rank: no valid checkpoint, one of another run, or one that another node
            does not see.
    """
    if source == "none":
        return None, {}
    from runtime.saving import resume

    return resume.find_run(folder, source, identity, accept)


def load_run(checkpoint: Path | None, model, optimizer, scaler) -> dict:
    """Put back a checkpoint, random generators too; returns its counters, zeros for a new run."""
    if checkpoint is None:
        return dict.fromkeys(COUNTERS, 0)
    from runtime.saving import resume

    _newest["checkpoint"] = checkpoint
    return resume.load_run(checkpoint, model, optimizer, scaler)


def restore(checkpoint: Path | None, scaler: torch.amp.GradScaler | None = None) -> dict:
    """As `load_run`, without tensors: only what is small in a checkpoint."""
    if checkpoint is None:
        return dict.fromkeys(COUNTERS, 0)
    from runtime.saving import resume

    return resume.restore(checkpoint, scaler)
