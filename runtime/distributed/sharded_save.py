"""Saving a run of which every rank holds a part: see `checkpoint`."""

import contextlib
import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.device import is_sharded
from runtime.ranks import world
from runtime.saving import background, safe_load, store
from runtime.saving.validity import check_seen, raise_not_saved

# "group": of the writing threads; "stager": keeps the memory of the copies; "newest": the last
# checkpoint that this run saved or loaded
_shared: dict = {}


def is_needed(tensors: dict[str, Tensor], optimizer, own_tensors: bool) -> bool:
    """Whether rank 0 lacks tensors that others have; on all ranks alike.

    Args:
        own_tensors: see `checkpoint.save_run`.
    """
    parts = getattr(optimizer, "parts", {"": optimizer}).values()
    is_zero1 = any(hasattr(part, "optim") for part in parts)  # a ZeroRedundancyOptimizer
    return own_tensors or is_zero1 or any(map(is_sharded, tensors.values()))


def snapshot(tensors: dict[str, Tensor], run: dict) -> tuple[dict[str, Tensor], dict]:
    """As `background.snapshot`, of DTensors, too; `write` is the job that it is for."""
    if "group" not in _shared:  # of the threads that write: training uses the default one
        _shared["group"] = dist.new_group(backend="gloo")
        background.state["collective"] = True
    if not any(map(is_sharded, tensors.values())):
        return background.snapshot(tensors, run)
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    if "stager" not in _shared:
        _shared["stager"] = DefaultStager(StagingOptions(False, False, False, False))
    background.state["rests"] = next(iter(tensors.values())).device.type == "cpu"
    return _shared["stager"].stage(tensors), copy.deepcopy(run)


def write(folder: Path, keep: int, tensors: dict[str, Tensor], run: dict) -> None:
    """Write a checkpoint, all processes of the group together."""
    group, rank, files = _shared["group"], world()[0], {}
    step = run["progress"]["step"]
    place = contextlib.nullcontext(folder / f".tmp-step_{step:08d}")
    if rank == 0:
        place = store.new_checkpoint(folder, step, keep, files)
    try:
        with place as building:
            dist.barrier(group)
            store.write_tensors(building, tensors, background.throttled_planner(), group)
            paths = building.glob(f"__{rank}_*")
            own = {path.name: store.describe(path, background.throttle) for path in paths}
            parts = [None] * group.size() if rank == 0 else None
            dist.gather_object(own, parts, group=group)
            if rank == 0:
                files.update({name: file for part in parts for name, file in part.items()})
                store.save_file(building / "run.pt", run)
                files |= {name: store.describe(building / name) for name in (".metadata", "run.pt")}
                check_seen(building, files)
    except BaseException as error:
        raise_not_saved(folder, step, error)
        raise
    remember_newest(folder / f"step_{step:08d}")


def remember_newest(checkpoint: Path) -> None:
    """Say which checkpoint `write_weights` reads."""
    _shared["newest"] = checkpoint


def write_weights(path: Path, shapes: dict[str, torch.Size], part: str, config: str) -> None:
    """Write the weights of the newest checkpoint; `part`, `config`: see `checkpoint.save_weights`."""
    store.write_weights(path, read_weights(_shared["newest"], shapes, part), config)


def read_weights(checkpoint: Path, shapes: dict[str, torch.Size], part: str) -> dict[str, Tensor]:
    """The weights of a checkpoint as whole tensors: those in `shapes`, saved as `part` + name."""
    import torch.distributed.checkpoint as dcp

    reader = safe_load.reader(checkpoint)
    saved = reader.read_metadata().state_dict_metadata
    weights = {f"model.{part}{name}": torch.empty(shape) for name, shape in shapes.items()}
    weights = {name: value for name, value in weights.items() if name in saved}
    dcp.load(weights, storage_reader=reader, no_dist=True)
    background.throttle()
    state_dict = {name: weights.get(f"model.{part}{name}") for name in shapes}
    if state_dict.get("lm_head.weight", ...) is None:  # tied: it has no entry of its own
        state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    return state_dict
