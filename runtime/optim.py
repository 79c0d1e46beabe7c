"""Optimizers: AdamW; Muon for the matrices inside the blocks with AdamW for everything else; LAMB
for large batches.

Here stands, too, what a learning rate is multiplied by where the batch grows with the number of
processes.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.device import fast_dtype, is_sharded, local


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, shard: bool = False
) -> "torch.optim.Optimizer | Muon":
    """The optimizer of a run.

    AdamW decays matrices only: norms, and whatever else is a vector, have no scale to keep small.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.

    Args:
        name: 'adamw', 'muon' or 'lamb'.
        lr: peak learning rate. The same number suits AdamW and Muon, whose updates are scaled to
        the size of AdamW's;
            LAMB's is the share of its own norm by which a matrix moves in a step.
        shard: ZeRO-1: every process keeps the state of some parameters, updates those, and
        broadcasts them.
            Source: Rajbhandari et al., ZeRO (2020), section 5.1.
    """
    parameters = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    inner = [p for key, p in parameters if is_block_matrix(key, p.shape)] if name == "muon" else []
    taken = {id(p) for p in inner}
    rest = [p for _, p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "lamb":
        return build(Lamb, groups, shard, lr=lr)
    adamw = build(AdamW, groups, shard, lr=lr, betas=(0.9, 0.95), fused=True)
    if not inner:
        return adamw
    return Muon(build(OrthogonalMomentum, inner, shard, lr=lr, weight_decay=weight_decay), adamw)


def is_block_matrix(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is one that Muon takes: the blocks' matrices, those of stacked experts
    (n, out, in) as well.

    The router is none: its rows are a classifier's, one for each expert.
    """
    return ".layers." in name and len(shape) > 1 and not name.endswith("mlp.gate.weight")


def build(kind: type, parameters: list, shard: bool, **options) -> torch.optim.Optimizer:
    if not shard:
        return kind(parameters, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, kind, **options)


class Uncompiled(torch.optim.Optimizer):
    """torch's optimizer without its guards for torch.compile, which import the compiler: two
    seconds of every start."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__


class AdamW(Uncompiled, torch.optim.AdamW):
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)


class OrthogonalMomentum(Uncompiled):
    """Replaces the momentum of a matrix by the nearest orthogonal matrix, so that all directions
    learn at one pace.

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
    """A matrix (m, n) with its singular values brought to about 1 (0.7 to 1.2, those near 0 part of
    the way).

    Of stacked ones (..., m, n) each by itself.

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


class Muon:
    """Two optimizers that act as one: `muon` on the blocks' matrices, `adamw` on everything
    else."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = {"muon": muon, "adamw": adamw}
        self.param_groups = [
            *muon.param_groups,
            *adamw.param_groups,
        ]  # the dicts themselves: a new lr reaches both

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)


class Lamb(Uncompiled):
    """Adam's update of every layer, with the length of lr times the layer's own norm.

    A layer is a matrix, also each of stacked ones. Vectors, and a head with one output, which is
    one, take Adam's update as it is; so does a layer whose norm is 0. Norms are those of whole
    matrices, however they are sharded.
    Source: You et al., Large Batch Optimization for Deep Learning (2020), algorithm 2, with phi(z)
    = z; betas and eps as there in section 4.
    """

    def __init__(
        self,
        parameters: list,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "step" not in state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                steps = state["step"].item()
                x, gradient, m, v = map(local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                m.lerp_(gradient, 1 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                update = (m / (1 - beta1**steps)) / (
                    (v / (1 - beta2**steps)).sqrt_() + group["eps"]
                )
                update.add_(x, alpha=group["weight_decay"])
                if p.numel() > max(p.shape):
                    update *= trust_ratio(p, x, update)
                x.sub_(update, alpha=lr)


def trust_ratio(p: Tensor, x: Tensor, update: Tensor) -> Tensor:
    """Norm of each layer of p divided by that of its update; 1 where one of them is 0.

    Args:
        p: (..., m, n), perhaps sharded.
        x, update: what this process holds of p, and of its update.

    Returns:
        (..., 1, 1), for the layers of which this process holds something.
    """
    # In float64, by rows first: the ratio is the same in every layout, see
    # `parallel.clip_gradients`.
    norms = [torch.linalg.vector_norm(t, dim=-1).double() for t in (x, update)]
    squares = torch.stack(norms).square_().sum(dim=-1)  # (2, ...)
    if is_sharded(p):
        squares = squares.to(
            p.device_mesh.device_type
        )  # where its processes can send it from, with offload, too
        for dim, placement in enumerate(p.placements):
            if (
                not placement.is_replicate() and placement.dim >= p.dim() - 2
            ):  # else each has layers of its own
                dist.all_reduce(squares, group=p.device_mesh.get_group(dim))
    norm, update_norm = squares.sqrt().to(x.device, x.dtype)[..., None, None]
    return torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)


def scale_lr(lr: float, scaling: str, processes: int) -> float:
    """The learning rate for a batch that is `processes` times that of one process.

    Args:
        scaling: 'none', 'linear' or 'sqrt'.
    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1, for 'linear'; Malladi
    et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms (2022), for 'sqrt', the
    rule for Adam.
    """
    return lr * {"none": 1, "linear": processes, "sqrt": math.sqrt(processes)}[scaling]
