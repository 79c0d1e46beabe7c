"""The random start of a model's parameters."""

import math

from torch import Tensor, nn


def init_parameter(name: str, p: Tensor, n_layers: int) -> None:
    """Give a matrix its random values: as GPT-2, residual outputs shrink with depth.

    Vectors keep what they were built with, biases apart, which begin at zero.
    """
    if p.dim() > 1 or name.endswith("bias"):
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        std = 0.02 / math.sqrt(2 * n_layers) if residual else 0.02
        nn.init.normal_(p, std=std if p.dim() > 1 else 0.0)
