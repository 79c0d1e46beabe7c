"""The optimizer of a run, and its learning rate where the batch grows with the processes."""

import math

import torch
from torch import nn

from runtime.optimizers.adamw import ADAMW, AdamW, decay_groups


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, shard: bool = False
) -> torch.optim.Optimizer:
    """AdamW, Muon or LAMB. Matrices decay; norms, and other vectors, have no scale to keep small.

    Args:
        name: 'adamw', 'muon' or 'lamb'.
        lr: peak learning rate. The same number suits AdamW and Muon, whose updates are scaled to
            the size of AdamW's; LAMB's is the share of its own norm by which a matrix moves in a
            step.
        shard: ZeRO-1, see `others.build`.
    """
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if name != "adamw" or shard:
        from runtime.optimizers import others

        return others.make_optimizer(trained, name, lr, weight_decay, shard)
    return AdamW(decay_groups([p for _, p in trained], weight_decay), lr=lr, **ADAMW)


def scale_lr(lr: float, scaling: str, processes: int) -> float:
    """The learning rate for a batch that is `processes` times that of one process.

    Args:
        scaling: 'none', 'linear' or 'sqrt'.
    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1, for 'linear'; Malladi
    et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms (2022), for 'sqrt', the
    rule for Adam.
    """
    return lr * {"none": 1, "linear": processes, "sqrt": math.sqrt(processes)}[scaling]
