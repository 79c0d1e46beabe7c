"""Who is who among the processes of a job; a process that is alone is rank 0 of 1.

Processes form a mesh of data x context x tensor ranks, tensor ranks being neighbours. Ranks of one
tensor group share every layer and see the same tokens; ranks of one context group share every row
of tokens; data ranks have rows of their own. Gradients are averaged over data x context ranks.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Sizes of the mesh, set by `distributed.mesh`; what is left of the processes are data ranks.
mesh_sizes = {"context": 1, "tensor": 1}
SHARDED = ("zero2", "zero3")  # strategies under which a process holds a part of the weights


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_world() -> tuple[int, int]:
    """(data rank, data ranks): which share of the rows this process takes."""
    rank, world_size = world()
    sharers = mesh_sizes["context"] * mesh_sizes["tensor"]
    return rank // sharers, world_size // sharers


def replicas() -> int:
    """Ranks over which gradients are averaged: the factor that turns their mean into a sum."""
    return world()[1] // mesh_sizes["tensor"]


def row_split() -> dict[str, int]:
    """What this process takes of a row, for `dataset.collate`."""
    context, tensor = mesh_sizes["context"], mesh_sizes["tensor"]
    return {"part": world()[0] // tensor % context, "parts": context, "multiple": context * tensor}


def is_shared(args) -> bool:
    """Whether a process holds a part of the model alone. Args: args: `strategy`, which is chosen."""
    return args.strategy in SHARDED or mesh_sizes["tensor"] > 1


def sum_over_ranks(*values: Tensor | float) -> list[float]:
    """Sum each number over data and context ranks; in a tensor group, where all know it, once."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    from runtime.distributed.exchange import sum_over_world

    return [number / mesh_sizes["tensor"] for number in sum_over_world(*values)]


def gather_objects(value: object) -> list[object]:
    """The value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, whatever it is wrapped in."""
    return model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else model
