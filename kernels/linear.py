"""Linear layers on a CPU: products in bfloat16 of its matrix unit, with float32 weights."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels import native

# Numbers in float32 that a core keeps in its cache from one pass over them to the next: 2 MiB, the
# L2 of a Xeon with AMX.
CACHED = 2**19
# Rows for which weight @ x.T beats x @ weight.T in float32. The figures of benchmarks/results are
# with these: xeon_amx.json, part generation of benchmarks/speed.
FEW_ROWS = range(8, 129)


class FastLinear(nn.Linear):
    """x @ weight.T + bias, by linear.cpp in training where that has products of the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not native.is_local_cpu_tensor(x, self.weight):
            return super().forward(x)
        dtype, training = native.autocast_dtype(x), torch.is_grad_enabled()
        if training and products(dtype) is not None:
            return LinearFunction.apply(x, self.weight, self.bias, dtype)
        one_token_each = x.dim() == 3 and x.size(1) == 1 and x.size(0) in FEW_ROWS
        if not training and dtype == torch.float32 and one_token_each:  # a step of generation
            out = (self.weight @ x.squeeze(1).T).T.contiguous().unsqueeze(1)
            return out if self.bias is None else out.add_(self.bias)
        return super().forward(x)


def products(dtype: torch.dtype) -> native.Library | None:
    """The functions of linear.cpp, where a CPU has instructions for products of bfloat16."""
    functions = native.library("linear.cpp", dtype) if dtype == torch.bfloat16 else None
    return functions if functions is not None and functions.has_products() else None


class LinearFunction(torch.autograd.Function):
    """x @ weight.T + bias by linear.cpp; gradients of weight and bias are summed in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtypes, x = (x.dtype, weight.dtype), x.to(dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.minimind.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.size(-1))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty(weight.shape)
            sum_of_products(grad_weight, grad, x.reshape(-1, x.size(-1)))
            grad_weight = grad_weight.to(ctx.dtypes[1])
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            multiply(grad_x.view(-1, x.size(-1)), grad, weight)
            grad_x = grad_x.to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=0, dtype=torch.float32).to(ctx.dtypes[1])
        return grad_x, grad_weight, grad_bias, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    """Product x @ weight.T + bias + x2 @ weight2.T: an operator, whose result `recompute` can keep.

    x may have any shape (..., in), x2 has two dimensions.
    """
    out = x.new_empty(*x.shape[:-1], len(weight))
    second = (x2, None if weight2 is None else weight2.T)
    multiply(out.view(-1, len(weight)), x.reshape(-1, x.size(-1)), weight.T, *second, bias)
    return out


OPERATORS = torch.library.Library("minimind", "DEF")
OPTIONS = "Tensor? bias=None, Tensor? x2=None, Tensor? weight2=None"
OPERATORS.define(f"linear(Tensor x, Tensor weight, {OPTIONS}) -> Tensor")
OPERATORS.impl("linear", linear, "CPU")


def keep_products() -> None:
    """Have gradient checkpointing of level 2 keep results of `linear`, like torch's products."""
    from model.recompute import EXPENSIVE

    if torch.ops.minimind.linear.default not in EXPENSIVE:
        EXPENSIVE.append(torch.ops.minimind.linear.default)


def multiply(
    out: Tensor,
    x: Tensor,
    matrix: Tensor,
    x2: Tensor | None = None,
    matrix2: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """In place: out (M, N) = x (M, K) @ matrix (K, N), + x2 (M, K2) @ matrix2, + bias (N,) if given.

    A matrix may have another dtype: in float32 it is rounded on the way, where a CPU can.
    """
    functions = products(x.dtype) if x.device.type == "cpu" else None
    K, N = matrix.shape
    K2 = 0 if matrix2 is None else len(matrix2)
    if functions is None or matrix.dtype != torch.float32 or K % 32 or N % 32 or K2 % 32:
        torch.mm(x, matrix.to(x.dtype), out=out)
        if bias is not None:
            out += bias
        if x2 is not None:
            out.addmm_(x2, matrix2.to(x.dtype))
    elif matrix.is_contiguous():
        assert bias is None
        pair = (None, None) if x2 is None else (x2.contiguous(), matrix2)
        functions.linear_grad_x(x.contiguous(), matrix, *pair, out, len(x), N, K, K2)
    else:
        bias = None if bias is None else bias.float()
        pair = (None, None) if x2 is None else (x2.contiguous(), matrix2.T.contiguous())
        functions.linear(x.contiguous(), matrix.T.contiguous(), *pair, bias, out, len(x), N, K, K2)


def sum_of_products(total: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """In place: total (M, N) float32 = or += a.T @ b; a (K, M), b (K, N)."""
    if a.dtype == torch.float32:
        torch.addmm(total, a.T, b, beta=int(add), out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a.T, b, beta=int(add), out_dtype=torch.float32, out=total)
    elif (functions := products(a.dtype)) is not None:
        sizes = len(a), a.size(1), b.size(1)
        functions.linear_grad_weight(a.contiguous(), b.contiguous(), total, *sizes, int(add))
    else:  # some rows at a time, then cast
        rows = max(1, 8 * CACHED // b.size(1))
        for part, columns in zip(total.split(rows), a.split(rows, dim=1), strict=True):
            product = columns.T @ b
            part.add_(product) if add else part.copy_(product)


def length_step(tokens: int, weight: Tensor) -> int:
    """Of what the lengths of rows should be a multiple, around so many tokens.

    oneDNN prepares bfloat16 products by their shape, which takes milliseconds for every new one,
    and rows of documents hardly ever have the same length. With the step returned they grow by 3 %
    at most, and there are 32 lengths between one power of two and the next. linear.cpp prepares
    nothing: 1.
    """
    whole = type(weight) is nn.Parameter  # not spread over processes, which keep their own lengths
    if not whole or weight.device.type != "cpu" or native.autocast_dtype(weight) != torch.bfloat16:
        return 1
    if products(torch.bfloat16) is not None and weight.size(-1) % 32 == 0:
        return 1
    return 2 ** max(0, tokens.bit_length() - 6)


def pad_row(model, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook of MiniMindLM: a packed row gets a length of `length_step`.

    Only where the caller says which tokens it asks about: else there would be logits of padding.
    """
    names = ("logits_at", "values_at", "at")
    asked = hasattr(model, "score") or any(kwargs.get(name) is not None for name in names)
    if not args or not asked or kwargs.get("doc_lens") is None or model.context is not None:
        return None
    tokens = args[0].size(1)
    step = length_step(tokens, model.model.embed_tokens.weight)
    if step == 1:
        return None
    padding = (0, native.round_up(tokens, step) - tokens)
    return (nn.functional.pad(args[0], padding), *args[1:]), kwargs
