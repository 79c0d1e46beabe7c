"""What a device is good at, and in which order it sums."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the fastest matrix products of a device: many CPUs emulate bfloat16, a hundred times slower."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def one_order(device: torch.device) -> Iterator[None]:
    """Have a GPU sum in the same order every time: a run that goes on is bit-identical to one that never stopped.

    Some kernels, that of the gradient of attention first, else add in the order in which their threads arrive. A CPU
    has none of these.
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
