"""Rotary positions and SwiGLU, each in one pass over memory."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from model import lm


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`lm.apply_rope`, whose gradient is the rotation back."""
    if torch.compiler.is_compiling():
        return lm.apply_rope(x, cos, sin)
    return RotaryFunction.apply(x, cos, sin)


class RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    functions = native.functions_for(x)
    if functions is not None and cos.shape[:-1] == (*x.shape[:-2], 1):  # one angle for all heads
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        sizes = x.shape[:-2].numel(), x.size(-2), cos.size(-1)
        functions.rotate(x, cos.contiguous(), sin.contiguous(), out, *sizes)
        return out
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    left, right = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


class FastSwiGLU(lm.SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    functions = native.functions_for(gate)
    if functions is None or not native.is_local_cpu_tensor(up) or gate.dtype != up.dtype:
        return F.silu(gate) * up
    return SwiGLUFunction.apply(gate, up, functions)


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, functions) -> Tensor:
        gate, up, out = (
            gate.contiguous(),
            up.contiguous(),
            torch.empty(gate.shape, dtype=gate.dtype),
        )
        functions.swiglu(gate, up, out, gate.numel())
        ctx.functions = functions
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        upstream = grad.contiguous()
        ctx.functions.swiglu_backward(gate, up, upstream, grad_gate, grad_up, gate.numel())
        return grad_gate, grad_up, None
