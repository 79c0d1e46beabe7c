"""The start of a model's parameters: random, or without values until a file is read."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def init_parameter(name: str, p: Tensor, n_layers: int) -> None:
    """Give a matrix its random values: as GPT-2, residual outputs shrink with depth.

    Vectors keep what they were built with, biases apart, which begin at zero.
    """
    if p.dim() > 1 or name.endswith("bias"):
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        std = 0.02 / math.sqrt(2 * n_layers) if residual else 0.02
        nn.init.normal_(p, std=std if p.dim() > 1 else 0.0)


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
