"""Who is who among the processes of a job, and how they exchange numbers; works alone, too.

Processes form a mesh of data x context x tensor ranks, tensor ranks being neighbours. Ranks of one
tensor group share every layer and see the same tokens; ranks of one context group share every row
of tokens; data ranks have rows of their own. Gradients are averaged over data x context ranks.
"""

import torch
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


def as_message(values: tuple[Tensor | float, ...]) -> Tensor:
    """Numbers as one tensor of float64, where the processes can send it from."""
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    if dist.is_initialized() and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "mps":  # which has no float64
        device = torch.device("cpu")
        values = tuple(v.cpu() if isinstance(v, Tensor) else v for v in values)
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def sum_over_world(*values: Tensor | float) -> list[float]:
    """Sum each number over all processes, in one message."""
    numbers = as_message(values)
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def sum_over_ranks(*values: Tensor | float) -> list[float]:
    """Sum each number over data and context ranks; in a tensor group, where all know it, once."""
    return [number / mesh_sizes["tensor"] for number in sum_over_world(*values)]


def gather_numbers(*values: Tensor | float) -> list[list[float]]:
    """The numbers of every rank, in rank order, in one message."""
    rank, world_size = world()
    numbers = as_message(values)
    if world_size == 1:
        return [numbers.tolist()]
    table = numbers.new_zeros(world_size, len(values))  # to which each rank adds its row
    table[rank] = numbers
    dist.all_reduce(table)
    return table.tolist()


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
