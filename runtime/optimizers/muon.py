"""Muon: orthogonal updates for the matrices inside the blocks, AdamW for everything else."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from runtime.device import fast_dtype, is_sharded
from runtime.optimizers.adamw import Uncompiled


def is_block_matrix(name: str, shape: torch.Size) -> bool:
    """Whether Muon takes a parameter: the blocks' matrices, stacked experts (n, out, in) as well.

    The router is none: its rows are a classifier's, one for each expert.
    """
    return ".layers." in name and len(shape) > 1 and not name.endswith("mlp.gate.weight")


class Muon:
    """Two optimizers that act as one: Muon on the blocks' matrices, AdamW on everything else."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = {"muon": muon, "adamw": adamw}
        # The dicts themselves: a new lr reaches both
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)


class OrthogonalMomentum(Uncompiled):
    """Replaces the momentum of a matrix by the nearest orthogonal one: directions learn alike.

    Stacked matrices (experts, m, n) are so many matrices.

    Source: Jordan et al., Muon (2024), with Nesterov momentum; the size of an update, 0.2
    sqrt(max(m, n)), as in Liu et al., Muon is Scalable for LLM Training (2025), eq. 4: that of
    AdamW's.
    """

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for same in of_one_shape([p for p in group["params"] if p.grad is not None]):
                momenta = []
                for p in same:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                    average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    momenta.append(p.grad.lerp(average, group["momentum"]))
                updates = (
                    map(orthogonalise, momenta)
                    if len(same) == 1
                    else orthogonalise(torch.stack(momenta))
                )
                for p, update in zip(same, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(
                        update.to(p.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:]))
                    )


def of_one_shape(parameters: list[Tensor], most: int = 2**22) -> Iterator[list[Tensor]]:
    """Parameters of one shape together, up to `most` numbers at a time; sharded ones each alone.

    Products of small matrices one by one leave most of a machine idle.
    """
    groups = {}
    for p in parameters:
        groups.setdefault(id(p) if is_sharded(p) else (p.shape, p.dtype, p.device), []).append(p)
    for same in groups.values():
        count = max(1, most // same[0].numel())
        yield from (same[at : at + count] for at in range(0, len(same), count))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix (m, n), or stacked ones (..., m, n), with singular values brought to about 1.

    To 0.7 to 1.2, those near 0 part of the way.
    In bfloat16 where the machine multiplies it fast, in float32 elsewhere: the result is as good.
    Source: Jordan et al., Muon (2024): a quintic Newton-Schulz iteration with coefficients for the
    steepest rise at 0.
    """
    x = matrix.to(fast_dtype(matrix.device)).reshape(-1, *matrix.shape[-2:])
    x = x.mT if x.size(-2) > x.size(-1) else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(
        1e-7
    )  # the largest singular value is at most 1
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if matrix.size(-2) > matrix.size(-1) else x).reshape(matrix.shape)
