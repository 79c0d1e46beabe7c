"""Mixture of experts: a fused router, rows sorted by expert, one grouped product for all."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from kernels.compiling import uncompiled
from kernels.linear import length_step, multiply, products, sum_of_products
from kernels.native import round_up
from kernels.pointwise import swiglu
from model.moe import Experts, MoE, Router

# The rows of an expert are filled up to a multiple of so many. A product of few rows is rounded in
# another way (MKL: fewer than 4 a thread), so the routing of one document would change its
# neighbours' logits by 1e-6.
ROW_BLOCK = 16


class FastRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        functions = native.functions_for(x)
        if functions is None or not native.is_local_cpu_tensor(self.weight):
            return super().forward(x)
        return RouterFunction.apply(x, self.weight, functions).softmax(dim=-1)


class RouterFunction(torch.autograd.Function):
    """x @ weight.T in float32, whatever the dtype of x, for the few rows of a weight (E, dim)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, functions) -> Tensor:
        ctx.dtype, ctx.functions = weight.dtype, functions
        x, weight = x.contiguous(), weight.float().contiguous()
        ctx.sizes = x.shape[:-1].numel(), x.size(-1), len(weight)
        ctx.save_for_backward(x, weight)
        out = torch.empty(*x.shape[:-1], len(weight))
        functions.router_logits(x, weight, out, *ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        backward = ctx.functions.router_logits_backward
        backward(x, weight, grad.contiguous(), grad_x, grad_weight, *ctx.sizes)
        return grad_x, grad_weight.to(ctx.dtype), None


class FastMoE(MoE):
    route = uncompiled(MoE.route)


class FastExperts(Experts):
    """One grouped product over rows sorted by expert instead of a loop.

    Attributes:
        partial: set where other processes have other experts, so that choices may be none of these.
    """

    partial = False

    def forward(self, x: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
        if not native.is_local(x, self.gate_up_proj):
            return super().forward(x, weight, choice)
        k = choice.size(-1)
        flat = x.to(native.autocast_dtype(x)).reshape(-1, x.size(-1))  # (N, dim)
        # A step of generation has a token for each row of its batch and no documents to keep apart.
        block = 1 if x.size(1) == 1 else ROW_BLOCK
        rows, ends, row = self.dispatch(flat, choice.reshape(-1, k), block)
        gate, up = grouped_linear(rows, self.gate_up_proj, ends, parts=2)
        (out,) = grouped_linear(swiglu(gate, up), self.down_proj, ends)
        out = out.index_select(0, row).view(-1, k, out.size(-1))  # (N, k, dim)
        return (out * weight.reshape(-1, k, 1).to(out.dtype)).sum(dim=1).view(x.shape)

    @uncompiled  # how many rows an expert has is in the data
    def dispatch(self, x: Tensor, choice: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the rows of x (N, dim) by the experts that they chose, (N, k).

        Returns:
            (M, dim), those of each expert one behind the other, filled up to a multiple of `block`;
            (E,) int32, where each expert's end; (N * k,) int64, which of them are those of each
            token.
        """
        experts, (tokens, k) = len(self.down_proj), choice.shape
        if block > 1:  # a CPU prepares products by their shape
            block = max(block, 4 * length_step(tokens * k // experts, self.down_proj))
        numbers = torch.arange(experts, device=x.device).unsqueeze(1)
        visit = choice.flatten() == numbers  # (E, N * k)
        count = visit.sum(dim=1)  # (E,)
        size = round_up(count, block)
        ends = size.cumsum(dim=0)
        # Among all, before any are filled up.
        row = visit.flatten().cumsum(dim=0).view_as(visit) - 1
        shift = ends - size - count.cumsum(dim=0) + count
        row = ((row + shift.unsqueeze(1)) * visit).sum(dim=0)  # (N * k,)
        if x.device.type == "cpu":
            n_rows = int(ends[-1])
        else:  # a shape that is known beforehand: a GPU would have to be waited for
            n_rows = round_up(tokens * k + experts * (block - 1), block)
        if self.partial:  # one more block, whose last row is for choices that are none of these
            n_rows += block
            row = row.where(visit.any(dim=0), n_rows - 1)
        ends[-1:].fill_(n_rows)
        order = torch.arange(tokens * k, device=x.device) // k
        token = row.new_zeros(n_rows).index_copy_(0, row, order)
        return DispatchFunction.apply(x, token, row), ends.int(), row


class DispatchFunction(torch.autograd.Function):
    """Gather tokens x (N, dim) at the rows of experts, (M, dim); its gradient is gathered, too.

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
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.size(1)).sum(dim=1)
        return grad, None, None


@uncompiled
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
    """Product x (M, in) @ weight[group].T, in the dtype of x, as `parts` tensors (M, out / parts).

    Args:
        weight: (groups, out, in), in any dtype.
        ends: (groups,) int32: where the rows of each group end.
    """
    return GroupedLinearFunction.apply(x, weight, ends, parts)


class GroupedLinearFunction(torch.autograd.Function):
    """The gradient of the weight comes in its own layout and dtype, part by part."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.dtype = weight.dtype
        if x.device.type != "cpu" or products(x.dtype) is None:  # which rounds it on the way
            weight = weight.to(x.dtype)  # once for both directions
        ctx.save_for_backward(x, weight, ends)
        return tuple(
            grouped_mm(x, part.transpose(1, 2), ends) for part in weight.chunk(parts, dim=1)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x, weight, ends), grads = ctx.saved_tensors, [grad.contiguous() for grad in grads]
        first, *second = weight.chunk(len(grads), dim=1)  # at most one more
        grad_x = grouped_mm(grads[0], first, ends, *grads[1:], *second)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            dtype = torch.float32 if x.device.type == "cpu" else ctx.dtype
            grad_weight = torch.empty_like(weight, dtype=dtype)
            for total, grad in zip(grad_weight.chunk(len(grads), dim=1), grads, strict=True):
                grouped_sums(total, grad, x, ends)
            grad_weight = grad_weight.to(ctx.dtype)
        return grad_x, grad_weight, None, None


def group_sizes(x: Tensor, ends: Tensor) -> list[int] | None:
    """Rows of each group of x, where products are made group by group: in bfloat16 on a CPU."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return None
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def grouped_mm(
    x: Tensor,
    matrix: Tensor,
    ends: Tensor,
    x2: Tensor | None = None,
    matrix2: Tensor | None = None,
) -> Tensor:
    """Of x (M, K) and matrix[group] (K, N) the product, (M, N); + x2 @ matrix2[group] if given."""
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
    """total[group] (groups, M, N), float32 on a CPU, = a[rows].T @ b[rows]; a (K, M), b (K, N)."""
    sizes = group_sizes(a, ends)
    if sizes is None:
        total.copy_(F.grouped_mm(a.T, b, offs=ends))
        return
    for result, left, right in zip(total, a.split(sizes), b.split(sizes), strict=True):
        sum_of_products(result, left, right)


REPLACEMENTS = {
    "cuda": {MoE: FastMoE, Experts: FastExperts},
    "cpu": {Router: FastRouter, MoE: FastMoE, Experts: FastExperts},
}
