"""Optimizers other than AdamW, and those whose state is sharded over processes."""

import torch
from torch import nn

from runtime.optimizers.adamw import ADAMW, AdamW, decay_groups


def make_optimizer(
    parameters: list[tuple[str, nn.Parameter]],
    name: str,
    lr: float,
    weight_decay: float,
    shard: bool,
) -> torch.optim.Optimizer:
    """As `optim.make_optimizer`, for parameters with their names."""
    block_matrices = []
    if name == "muon":
        from runtime.optimizers.muon import Muon, OrthogonalMomentum, is_block_matrix

        block_matrices = [p for key, p in parameters if is_block_matrix(key, p.shape)]
    taken = {id(p) for p in block_matrices}
    groups = decay_groups([p for _, p in parameters if id(p) not in taken], weight_decay)
    if name == "lamb":
        from runtime.optimizers.lamb import Lamb

        return build(Lamb, groups, shard, lr=lr)
    adamw = build(AdamW, groups, shard, lr=lr, **ADAMW)
    if not block_matrices:
        return adamw
    options = {"lr": lr, "weight_decay": weight_decay}
    return Muon(build(OrthogonalMomentum, block_matrices, shard, **options), adamw)


def build(kind: type, parameters: list, shard: bool, **options) -> torch.optim.Optimizer:
    """An optimizer of a kind, its state sharded over the processes or not.

    Args:
        shard: ZeRO-1: every process keeps the state of some parameters, updates those, and
            broadcasts them.
            Source: Rajbhandari et al., ZeRO (2020), section 5.1.
    """
    if not shard:
        return kind(parameters, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, kind, **options)
