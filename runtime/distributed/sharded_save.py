"""Saving a run of which every rank holds a part: see `checkpoint`."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.saving import background, safe_load

_shared: dict = {}  # "group": of the writing threads; "stager": keeps the memory of the copies


def writing_group() -> dist.ProcessGroup:
    """The processes that write together: a group of its own, as training uses the default one."""
    if "group" not in _shared:
        _shared["group"] = dist.new_group(backend="gloo")
        background.need_other_ranks()
    return _shared["group"]


def stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of DTensors and others as they are now, in the memory of the CPU."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    if "stager" not in _shared:
        _shared["stager"] = DefaultStager(StagingOptions(False, False, False, False))
    return _shared["stager"].stage(tensors)


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
