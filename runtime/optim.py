"""The optimizer of a run, and its learning rate where the batch grows with the processes."""

import math

import torch
from torch import nn

from runtime.optimizers.adamw import AdamW


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, shard: bool = False
) -> torch.optim.Optimizer:
    """AdamW, Muon or LAMB. Matrices decay; norms, and other vectors, have no scale to keep small.

    Args:
        name: 'adamw', 'muon' or 'lamb'.
        lr: peak learning rate. The same number suits AdamW and Muon, whose updates are scaled to
            the size of AdamW's; LAMB's is the share of its own norm by which a matrix moves in a
            step.
        shard: ZeRO-1: every process keeps the state of some parameters, updates those, and
            broadcasts them.
            Source: Rajbhandari et al., ZeRO (2020), section 5.1.
    """
    parameters = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    block_matrices = []
    if name == "muon":
        from runtime.optimizers.muon import Muon, OrthogonalMomentum, is_block_matrix

        block_matrices = [p for key, p in parameters if is_block_matrix(key, p.shape)]
    taken = {id(p) for p in block_matrices}
    rest = [p for _, p in parameters if id(p) not in taken]
    dims = {id(p): len(getattr(p, "ds_shape", p.shape)) for p in rest}  # DeepSpeed: none has values
    groups = [
        {"params": [p for p in rest if dims[id(p)] > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if dims[id(p)] <= 1], "weight_decay": 0.0},
    ]
    if name == "lamb":
        from runtime.optimizers.lamb import Lamb

        return build(Lamb, groups, shard, lr=lr)
    adamw = build(AdamW, groups, shard, lr=lr, betas=(0.9, 0.95), fused=True)
    if not block_matrices:
        return adamw
    options = {"lr": lr, "weight_decay": weight_decay}
    return Muon(build(OrthogonalMomentum, block_matrices, shard, **options), adamw)


def build(kind: type, parameters: list, shard: bool, **options) -> torch.optim.Optimizer:
    """An optimizer of a kind, its state sharded over the processes or not."""
    if not shard:
        return kind(parameters, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, kind, **options)


def scale_lr(lr: float, scaling: str, processes: int) -> float:
    """The learning rate for a batch that is `processes` times that of one process.

    Args:
        scaling: 'none', 'linear' or 'sqrt'.
    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1, for 'linear'; Malladi
    et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms (2022), for 'sqrt', the
    rule for Adam.
    """
    return lr * {"none": 1, "linear": processes, "sqrt": math.sqrt(processes)}[scaling]
