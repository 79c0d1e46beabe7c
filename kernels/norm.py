"""Fused RMSNorm, alone and with the addition to the residual stream before it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from model.layout import Layout
from model.lm import Block, RMSNorm


class FastRMSNorm(RMSNorm):
    """Returns the dtype of matrix products: each projection behind it would cast the same again."""

    def forward(self, x: Tensor) -> Tensor:
        return add_rms_norm(x, None, self)[1]


class FastBlock(Block):
    """A block whose residual additions are one with the norms behind them, in both directions."""

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        norms = self.input_layernorm, self.post_attention_layernorm
        plain = torch.compiler.is_compiling() or not native.is_local_cpu_tensor(x)
        if plain or not native.is_local_cpu_tensor(*(norm.weight for norm in norms)):
            return super().forward(x, layout)
        x, h = add_rms_norm(x, None, norms[0])
        x, h = add_rms_norm(x, self.drop(self.self_attn(h, layout)), norms[1])
        out, aux_loss = self.feed_forward(h, layout)
        return x + self.drop(out), aux_loss


def add_rms_norm(x: Tensor, branch: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """The residual stream x + branch, if there is one, and the norm of that."""
    dtype, weight, functions = native.autocast_dtype(x), norm.weight, None
    if native.is_local_cpu_tensor(weight) and x.dtype in (dtype, torch.float32):
        functions = native.functions_for(x, dtype)
    if branch is not None and (
        functions is None or branch.dtype != dtype or not native.is_local_cpu_tensor(branch)
    ):
        x, branch = x + branch, None
    if functions is None:
        return x, F.rms_norm(x.float(), weight.shape, weight.float(), norm.eps).to(dtype)
    return AddRMSNormFunction.apply(x, branch, weight, norm.eps, dtype, functions)


class AddRMSNormFunction(torch.autograd.Function):
    """`add_rms_norm` by ops.cpp: one pass over memory, and another one for its gradients."""

    @staticmethod
    def forward(ctx, x, branch, weight, eps: float, dtype: torch.dtype, functions):
        x = residual = x.contiguous()
        if branch is not None:
            branch, residual = branch.contiguous(), torch.empty_like(x)
        gain, out = weight.float().contiguous(), torch.empty(x.shape, dtype=dtype)
        scales = torch.empty(x.shape[:-1])
        name = "add_norm" if x.dtype == dtype else "add_norm_float"
        sizes = scales.numel(), x.size(-1)
        getattr(functions, name)(x, branch, residual, gain, out, scales, *sizes, eps)
        ctx.function, ctx.sizes = getattr(functions, f"{name}_backward"), sizes
        ctx.has_branch, ctx.dtype = branch is not None, weight.dtype
        ctx.save_for_backward(residual, gain, scales)
        ctx.set_materialize_grads(False)
        return residual, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_residual: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual, gain, scales = ctx.saved_tensors
        grad = grad.contiguous()
        grad_residual = None if grad_residual is None else grad_residual.contiguous()
        grad_x, grad_gain, rounded = torch.empty_like(residual), torch.empty_like(gain), None
        if ctx.has_branch and grad.dtype != residual.dtype:
            rounded = torch.empty_like(grad)
        saved = residual, gain, scales, grad, grad_residual
        ctx.function(*saved, grad_x, rounded, grad_gain, *ctx.sizes)
        grad_branch = None if not ctx.has_branch else grad_x if rounded is None else rounded
        return grad_x, grad_branch, grad_gain.to(ctx.dtype), None, None, None
