"""Optimizers: AdamW, or Muon for the matrices inside the blocks with AdamW for everything else."""

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, shard: bool = False
) -> "torch.optim.Optimizer | Muon":
    """The optimizer of a run.

    AdamW decays matrices only: norms, and whatever else is a vector, have no scale to keep small.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.

    Args:
        name: 'adamw' or 'muon'.
        lr: peak learning rate, the same number for both: Muon's updates are scaled to the size of AdamW's.
        shard: ZeRO-1: every process keeps the state of some parameters, updates those, and broadcasts them.
            Source: Rajbhandari et al., ZeRO (2020), section 5.1.
    """
    parameters = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    inner = [p for key, p in parameters if p.dim() == 2 and ".layers." in key] if name == "muon" else []
    taken = {id(p) for p in inner}
    rest = [p for _, p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adamw = build(torch.optim.AdamW, groups, shard, lr=lr, betas=(0.9, 0.95), fused=True)
    if not inner:
        return adamw
    options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return Muon(build(torch.optim.Muon, inner, shard, **options), adamw)


def build(kind: type, parameters: list, shard: bool, **options) -> torch.optim.Optimizer:
    if not shard:
        return kind(parameters, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, kind, **options)


class Muon:
    """Two optimizers that act as one: `muon` on matrices, `adamw` on everything else.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that all directions learn at one pace.
    Source: Jordan et al., Muon (2024), Newton-Schulz iteration; update size as in Liu et al., Muon is Scalable for LLM
    Training (2025), eq. 4.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = {"muon": muon, "adamw": adamw}
        self.param_groups = [*muon.param_groups, *adamw.param_groups]  # the dicts themselves: a new lr reaches both

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)
