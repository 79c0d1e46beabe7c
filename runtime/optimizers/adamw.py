"""AdamW, and the base of our optimizers: torch's without what imports its compiler."""

import torch
from torch import nn

ADAMW = {"betas": (0.9, 0.95), "fused": True}


class Uncompiled(torch.optim.Optimizer):
    """torch's optimizer without its guards for torch.compile, which import the compiler.

    That takes two seconds of every start.
    """

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__


class AdamW(Uncompiled, torch.optim.AdamW):
    """Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2."""

    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices, which decay, and vectors, which do not."""
    dims = {
        id(p): len(getattr(p, "ds_shape", p.shape)) for p in parameters
    }  # DeepSpeed: none has values
    return [
        {"params": [p for p in parameters if dims[id(p)] > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if dims[id(p)] <= 1], "weight_decay": 0.0},
    ]
