"""LAMB: Adam's updates, scaled by layer; for large batches."""

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.device import is_sharded, local, to_float64
from runtime.optimizers.adamw import Uncompiled


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
    norms = torch.stack([torch.linalg.vector_norm(t, dim=-1) for t in (x, update)])
    squares = to_float64(norms).square_().sum(dim=-1)  # (2, ...)
    if is_sharded(p):
        squares = squares.to(
            p.device_mesh.device_type
        )  # where its processes can send it from, with offload, too
        for dim, placement in enumerate(p.placements):
            if (
                not placement.is_replicate() and placement.dim >= p.dim() - 2
            ):  # else each has layers of its own
                dist.all_reduce(squares, group=p.device_mesh.get_group(dim))
    norm, update_norm = squares.sqrt().to(x.dtype).to(x.device)[..., None, None]
    return torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)
