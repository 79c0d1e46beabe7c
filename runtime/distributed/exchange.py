"""Numbers that the processes of a job send to each other."""

import torch
import torch.distributed as dist
from torch import Tensor


def as_message(values: tuple[Tensor | float, ...]) -> Tensor:
    """Numbers as one tensor of float64, where the processes can send it from."""
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "mps":  # which has no float64
        device = torch.device("cpu")
        values = tuple(v.cpu() if isinstance(v, Tensor) else v for v in values)
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def sum_over_world(*values: Tensor | float) -> list[float]:
    """Sum each number over all processes, in one message."""
    numbers = as_message(values)
    dist.all_reduce(numbers)
    return numbers.tolist()


def gather_numbers(*values: Tensor | float) -> list[list[float]]:
    """The numbers of every rank, in rank order, in one message."""
    numbers = as_message(values)
    table = numbers.new_zeros(dist.get_world_size(), len(values))  # to which each rank adds its row
    table[dist.get_rank()] = numbers
    dist.all_reduce(table)
    return table.tolist()
