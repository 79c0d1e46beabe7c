"""What processes do together: wrap the model, agree on a step, do things in turn. Works alone, too."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(hours=12)  # of a rank that waits for another one to tokenise; a dead one is noticed at once


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(model: nn.Module, strategy: str, device: torch.device, compile: bool) -> nn.Module:
    """The model as the training loop calls it.

    DDP: gradients are views of the communication buckets instead of copies. Compiled block by block: eight blocks of
    one shape are then compiled once.

    Args:
        strategy: 'ddp', or 'auto' for what fits; alone, the model itself.
        compile: torch.compile the blocks, for any length.
    """
    assert strategy in ("auto", "ddp"), strategy
    if compile:
        for block in model.model.layers:
            block.compile(dynamic=True)
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, whatever it is wrapped in."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_gradients(model: nn.Module, sync: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: gradients are exchanged only where `sync` is true."""
    return nullcontext() if sync or not isinstance(model, DistributedDataParallel) else model.no_sync()


def sum_over_ranks(*values: torch.Tensor | float) -> list[float]:
    """Sum each number over all ranks, in one message of float64."""
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


@torch.no_grad()
def evaluate(loss_of: Callable, model: nn.Module, dataset, rows, batch_size: int, autocast, device) -> float:
    """Mean loss per supervised token of some rows; each counts once, whatever the number of ranks.

    Args:
        loss_of: (model, X, Y, loss_mask, doc_lens, device) -> (summed loss, auxiliary loss), as in training.
        rows: (n,) ids into the dataset, the same on every rank.
    """
    (rank, world_size), alone = world(), unwrap(model)  # without the wrapper: ranks may have unequal numbers of batches
    alone.eval()
    mine = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)][rank::world_size]
    total = 0.0
    for batch in mine:
        with autocast:
            total += loss_of(alone, *dataset.collate([dataset[row] for row in batch]), device)[0].item()
    alone.train()
    return sum_over_ranks(total)[0] / int(dataset.supervised[rows].sum())


def gather_objects(value: object) -> list[object]:
    """The value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank_zero_first(build: Callable[[], object]) -> object:
    """Run `build` on rank 0, then on the other ranks, which find what it left (a token cache, say).

    Raises:
        ValueError: on every rank, when rank 0 raised one.
    """
    if not dist.is_initialized():
        return build()
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = build()
        except ValueError as raised:
            error = str(raised)
    message = [error]
    dist.broadcast_object_list(message, src=0, group=patient)
    if message[0] is not None:
        raise ValueError(message[0])
    return result if dist.get_rank() == 0 else build()
