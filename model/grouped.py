"""Products of a mixture of experts: the router's; those of rows sorted by expert, with a matrix for each group."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import native
from model.ops import kernels, multiply, products, sum_of_products, uncompiled


def few_products(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32, whatever the dtype of x, for a weight (few, dim). The gradient of x has its dtype."""
    functions = kernels(x)
    if functions is not None and native.plain(weight):
        return FewProducts.apply(x, weight, functions)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class FewProducts(torch.autograd.Function):
    """`few_products` in one pass over x, and its gradients in another."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, functions) -> Tensor:
        x, ctx.dtype, weight = x.contiguous(), weight.dtype, weight.float()
        ctx.functions, out = functions, torch.empty(*x.shape[:-1], len(weight))
        ctx.sizes = x.shape[:-1].numel(), x.size(-1), len(weight)
        ctx.save_for_backward(x, weight)
        native.call(functions.few_products, x, weight, out, *ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight = torch.empty_like(x), torch.empty_like(weight)
        native.call(ctx.functions.few_products_backward, x, weight, grad.contiguous(), by_x, by_weight, *ctx.sizes)
        return by_x, by_weight.to(ctx.dtype), None


class Dispatch(torch.autograd.Function):
    """x (N, dim) -> the tokens at the rows of experts, (M, dim). The gradient is gathered, not scattered.

    Args:
        token: (M,) int64: whose row it is; any token where a row only fills up.
        row: (N * k,) int64: the rows of each token. Others have no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.copies = max(1, len(row) // max(1, len(x)))
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.index_select(0, *ctx.saved_tensors)
        return grad if ctx.copies == 1 else grad.view(-1, ctx.copies, grad.size(1)).sum(dim=1), None, None


class GroupedLinear(torch.autograd.Function):
    """See `grouped_linear`. The gradient of the weight comes in its own layout and dtype, part by part."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.dtype = weight.dtype
        if x.device.type != "cpu" or products(x.dtype) is None:  # which rounds it on the way
            weight = weight.to(x.dtype)  # once for both directions
        ctx.save_for_backward(x, weight, ends)
        return tuple(grouped_mm(x, part.transpose(1, 2), ends) for part in weight.chunk(parts, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x, weight, ends), grads = ctx.saved_tensors, [grad.contiguous() for grad in grads]
        first, *second = weight.chunk(len(grads), dim=1)  # at most one more
        by_x = grouped_mm(grads[0], first, ends, *grads[1:], *second)
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = torch.empty_like(weight, dtype=torch.float32 if x.device.type == "cpu" else ctx.dtype)
            for total, grad in zip(by_weight.chunk(len(grads), dim=1), grads, strict=True):
                grouped_sums(total, grad, x, ends)
            by_weight = by_weight.to(ctx.dtype)
        return by_x, by_weight, None, None


@uncompiled
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
    """x (M, in) @ weight[group].T, in the dtype of x, as `parts` tensors (M, out / parts).

    Args:
        weight: (groups, out, in), in any dtype.
        ends: (groups,) int32: where the rows of each group end.
    """
    return GroupedLinear.apply(x, weight, ends, parts)


def group_sizes(x: Tensor, ends: Tensor) -> list[int] | None:
    """Rows of each group of x, where products are made group by group: in bfloat16 on a CPU, see `grouped_mm`."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return None
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def grouped_mm(
    x: Tensor, matrix: Tensor, ends: Tensor, x2: Tensor | None = None, matrix2: Tensor | None = None
) -> Tensor:
    """x (M, K) @ matrix[group] -> (M, N), + x2 @ matrix2[group] if there are these; matrix (groups, K, N)."""
    sizes = group_sizes(x, ends)
    if sizes is None:
        out = F.grouped_mm(x, matrix, offs=ends)
        return out if x2 is None else out.add_(F.grouped_mm(x2, matrix2, offs=ends))
    out = x.new_empty(len(x), matrix.size(2))
    none = [None] * len(sizes)
    x2, matrix2 = (none, none) if x2 is None else (x2.split(sizes), matrix2)
    for part in zip(out.split(sizes), x.split(sizes), matrix, x2, matrix2, strict=True):
        multiply(*part)
    return out


def grouped_sums(total: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> None:
    """total[group] (groups, M, N), float32 on a CPU, = a[rows].T @ b[rows] of its rows; a (K, M), b (K, N)."""
    sizes = group_sizes(a, ends)
    if sizes is None:
        total.copy_(F.grouped_mm(a.T, b, offs=ends))
        return
    for result, left, right in zip(total, a.split(sizes), b.split(sizes), strict=True):
        sum_of_products(result, left, right)
