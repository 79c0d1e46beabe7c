"""Models whose parameters have no memory until their values are read."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class SkipRandomInit(TorchFunctionMode):
    """No random numbers for parameters without memory: torch would import its compiler for that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Models that are made in here have names, shapes and ties, but no memory yet."""
    with torch.device("meta"), SkipRandomInit():
        yield
