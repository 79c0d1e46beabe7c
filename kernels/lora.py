"""LoRA layers on a CPU: the frozen product and the update in one pass, in both directions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from kernels.linear import multiply, products, sum_of_products
from model.lora import LoRALinear

RANK_BLOCK = 32  # ranks are filled up to a multiple of it: what linear.cpp multiplies at once


class FastLoRALinear(LoRALinear):
    """By linear.cpp in training, where that has products of the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, self.weight, self.lora_A, self.lora_B)
        plain = torch.compiler.is_compiling() or not native.is_local_cpu_tensor(*tensors)
        dtype = native.autocast_dtype(x)
        if plain or self.dropout or not torch.is_grad_enabled() or products(dtype) is None:
            return super().forward(x)
        factors = self.lora_A, self.lora_B, self.scale
        return LoRAFunction.apply(x, self.weight, self.bias, *factors, dtype)


class LoRAFunction(torch.autograd.Function):
    """x @ weight.T + bias + scale * x @ A.T @ B.T, where weight and bias are frozen."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype, ctx.scale, ctx.rank = x.dtype, scale, len(A)
        flat = x.to(dtype).reshape(-1, x.size(-1))  # (M, in)
        fill = -len(A) % RANK_BLOCK
        A = F.pad(A.float(), (0, 0, 0, fill))  # (rank, in)
        B = F.pad(B.float() * scale, (0, fill))  # (out, rank)
        low = torch.ops.minimind.linear(flat, A)
        out = torch.ops.minimind.linear(flat, weight, bias, low, B)
        ctx.save_for_backward(flat, low, weight, A, B)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, A, B = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.size(-1)).contiguous()  # (M, out)
        grad_low = torch.empty_like(low)
        multiply(grad_low, grad, B)
        grad_A, grad_B = torch.empty_like(A), torch.empty_like(B)
        sum_of_products(grad_A, grad_low, x)
        sum_of_products(grad_B, grad, low)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            multiply(grad_x, grad, weight, grad_low, A)
            grad_x = grad_x.view(*shape[:-1], -1).to(ctx.x_dtype)
        grad_B = grad_B[:, : ctx.rank] * ctx.scale
        return grad_x, None, None, grad_A[: ctx.rank], grad_B, None, None
