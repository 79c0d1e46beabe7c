"""The order in which a GPU sums."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
