"""What surrounds a forward and a backward pass in several processes, and on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def is_fsdp(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def sync_gradients(model: nn.Module, sync: bool) -> Iterator[None]:
    """Exchange gradients only where `sync` is true; see `parallel.sync_gradients`."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(sync)
    is_ddp = isinstance(model, DistributedDataParallel)
    held_back = model.no_sync() if is_ddp and not sync else nullcontext()
    with held_back, one_order(next(model.parameters()).device):
        yield


@contextmanager
def one_order(device: torch.device) -> Iterator[None]:
    """Have a GPU sum in the same order every time: a resumed run is bit-identical.

    Some kernels, that of the gradient of attention first, else add in the order in which their
    threads arrive. A CPU has none of these.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists on it
    torch.utils.deterministic.fill_uninitialized_memory = False  # what nobody reads
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
