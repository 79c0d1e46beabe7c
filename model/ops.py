"""Operations of the model where time and memory go, each written so that what is not needed never exists."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

CHUNK = {"cpu": 16 * 2**20, "cuda": 18 * 2**20}  # logits that exist at once, 64 or 72 MiB in float32, but for
LEAST = 64  # tokens at least: fewer would not be worth a pass over the weights
SLOW = [getattr(torch.ops.aten, name).default for name in (
    "mm", "_grouped_mm", "_flash_attention_forward", "_efficient_attention_forward",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")]  # fmt: skip
BLOCK = 2**19  # numbers in float32, 2 MiB, that a core of a CPU keeps in its cache from one pass over them to the next


def uncompiled(function: Callable) -> Callable:
    """Have torch.compile call a function as it is. torch.compiler.disable would import the compiler here: 2 s."""
    opaque = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return (opaque if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def recomputed(level: int, block: nn.Module, *args) -> tuple[Tensor, ...]:
    """block(*args). In training some activations are computed anew in the backward pass instead of being kept for it.

    Args:
        level: 0: none; 1: all of them, from the input on; 2: all but the results of what takes long, SLOW.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); Korthikanti et al., Reducing Activation
    Recomputation in Large Transformer Models (2022), section 5.
    """
    if not level or not block.training:
        return block(*args)
    selective = {"context_fn": functools.partial(create_selective_checkpoint_contexts, SLOW)} if level == 2 else {}
    return checkpoint(block, *args, use_reentrant=False, **selective)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x use: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def length_step(tokens: int, weight: Tensor) -> int:
    """Of what the lengths of rows should be a multiple, around so many tokens, for products with a weight.

    A CPU prepares bfloat16 products by their shape, which takes milliseconds for every new one, and rows of documents
    hardly ever have the same length. With the step returned they grow by 3 % at most, and there are 32 lengths between
    one power of two and the next.
    """
    whole = type(weight) is nn.Parameter  # not spread over processes, which have lengths of their own to keep
    if not whole or weight.device.type != "cpu" or autocast_dtype(weight) != torch.bfloat16:
        return 1
    return 2 ** max(0, tokens.bit_length() - 6)


def round_up(number: int | Tensor, step: int) -> int | Tensor:
    """The next multiple of `step`; of each number in a tensor of integers."""
    return -(-number // step) * step


class Linear(nn.Linear):
    """x @ weight.T, as nn.Linear. A CPU multiplies the few rows of a step of generation faster from the right."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.dim() == 3 and x.size(1) == 1 and 8 <= x.size(0) <= 128  # a token of each row
        if not step or torch.is_grad_enabled() or x.device.type != "cpu" or autocast_dtype(x) != torch.float32:
            return super().forward(x)
        return (self.weight @ x.squeeze(1).T).T.contiguous().unsqueeze(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, returned in the dtype of matrix products.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), eq. 4.
    """
    dtype = autocast_dtype(x)
    if x.device.type == "cpu" and dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return BlockwiseNorm.apply(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)


class BlockwiseNorm(torch.autograd.Function):
    """`rms_norm` to bfloat16 on a CPU, some rows at a time: what lies between input and result stays in its cache."""

    BLOCK = 2**17  # elements: half a MiB in float32

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, out = x.reshape(-1, x.size(-1)), torch.empty(x.shape, dtype=torch.bfloat16)
        scale = torch.empty(len(rows), 1)  # 1 / rms
        step = max(1, BlockwiseNorm.BLOCK // rows.size(1))
        for part, result, factor in zip(*(t.split(step) for t in (rows, out.view_as(rows), scale)), strict=True):
            part = part.float()
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=factor)
            factor.square_().div_(rows.size(1)).add_(eps).rsqrt_()
            result.copy_((part * factor).mul_(weight))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        gain = weight.float()
        by_x, by_weight = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(gain)
        tensors = [t.reshape(-1, x.size(-1)) for t in (x, grad, by_x)]
        step = max(1, BlockwiseNorm.BLOCK // x.size(-1))
        for part, upstream, result, factor in zip(*(t.split(step) for t in (*tensors, scale)), strict=True):
            unit, upstream = part * factor, upstream.float()  # (rows, D) float32: x / rms(x)
            both = unit * upstream
            by_weight += both.sum(0)
            along = (both @ gain).div_(x.size(-1)).unsqueeze(1)  # what only changes the length of x has no effect
            result.copy_((upstream * gain).addcmul_(unit, along, value=-1).mul_(factor))
        return by_x, by_weight.to(weight.dtype), None


class Rotation(torch.autograd.Function):
    """The turning of pairs by angles, whose gradient is turned back: see `apply_rope`."""

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
    (a, b), out = x.chunk(2, dim=-1), torch.empty_like(x)
    left, right = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, H, T, D) by the angle of their position.

    Source: Su et al., RoFormer (2021), eq. 34, in the half-split layout of the Llama and Qwen weights.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return Rotation.apply(x, cos, sin)


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
        ctx.dtype, weight = weight.dtype, weight.to(x.dtype)
        ctx.save_for_backward(x, weight, ends)
        return tuple(grouped_mm(x, part.transpose(1, 2), ends) for part in weight.chunk(parts, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x, weight, ends), grads = ctx.saved_tensors, [grad.contiguous() for grad in grads]
        parts = weight.chunk(len(grads), dim=1)
        by_x, *others = (grouped_mm(grad, part, ends) for grad, part in zip(grads, parts, strict=True))
        for other in others:
            by_x += other
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = torch.empty_like(weight, dtype=ctx.dtype)
            for total, grad in zip(by_weight.chunk(len(grads), dim=1), grads, strict=True):
                sum_of_products(total, grad, x, ends)
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


def grouped_mm(x: Tensor, matrix: Tensor, ends: Tensor) -> Tensor:
    """x (M, K) @ matrix[group] -> (M, N); matrix (groups, K, N).

    On 2 cores oneDNN leaves one idle in bfloat16 products of some 500 to 1,150 rows that sum more than they have
    columns. Half the columns at a time both work, 1.3 to 1.6 times as fast.
    """
    sizes = group_sizes(x, ends)
    if sizes is None:
        return F.grouped_mm(x, matrix, offs=ends)
    out = x.new_empty(len(x), matrix.size(2))
    for rows, factor, result in zip(x.split(sizes), matrix, out.split(sizes), strict=True):
        parts = 2 if 512 < len(rows) < 1152 and factor.size(0) > factor.size(1) else 1
        for columns, part in zip(factor.chunk(parts, dim=1), result.chunk(parts, dim=1), strict=True):
            torch.mm(rows, columns, out=part)
    return out


def sum_of_products(total: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> None:
    """total[group] (groups, M, N), in any dtype, = a[rows].T @ b[rows] of its rows; a (K, M), b (K, N)."""
    sizes = group_sizes(a, ends)
    if sizes is None:
        total.copy_(F.grouped_mm(a.T, b, offs=ends))
        return
    for result, left, right in zip(total, a.split(sizes), b.split(sizes), strict=True):
        result.copy_(left.T @ right)  # cast while it is in the cache


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (M, N) float32 += a.T @ b; a (K, M), b (K, N). On a CPU in another dtype some rows at a time, then cast."""
    if a.dtype == torch.float32:
        total.addmm_(a.T, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        rows = max(1, 8 * BLOCK // b.size(1))
        for part, columns in zip(total.split(rows), a.split(rows, dim=1), strict=True):
            part += columns.T @ b


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. The gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        head, rows = weight.to(x.dtype), max(LEAST, CHUNK[x.device.type] // len(weight))
        step = max(1, BLOCK // len(weight)) if x.device.type == "cpu" else rows
        loss, logits = torch.zeros((), device=x.device), x.new_empty(min(rows, len(x)), len(weight))
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
        for at in range(0, len(x), rows):
            part, target = x[at : at + rows], targets[at : at + rows].unsqueeze(1)
            chunk = torch.mm(part, head.T, out=logits[: len(part)])  # and then their gradient
            for block, right in zip(chunk.split(step), target.split(step), strict=True):
                log_probs = block.log_softmax(dim=1, dtype=torch.float32)
                at_target = log_probs.gather(1, right)
                loss -= at_target.sum()
                if grad_x is not None:
                    block.copy_(log_probs.exp_().scatter_add_(1, right, -torch.ones_like(at_target)))
                del log_probs  # before there is a next one
            if grad_x is not None:
                torch.mm(chunk, head, out=grad_x[at : at + rows])
            if grad_weight is not None:
                add_products(grad_weight, chunk, part)
        ctx.gradients, ctx.dtype = (grad_x, grad_weight), weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.gradients
        ctx.gradients = None  # they are scaled in place
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)
        return grad_x.mul_(grad.to(grad_x.dtype)), grad_weight, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(x @ weight.T)[target], summed over tokens: CHUNK logits at a time, made once, never kept.

    Args:
        x: (K, dim), in the dtype of the matrix products; K may be 0.
        weight: (vocab, dim) of the head, in any dtype. Its gradient is summed in float32.
        targets: (K,) int64.

    Returns: float32 scalar, to be differentiated once.
    Source: the gradient softmax - one_hot of Bishop, Pattern Recognition and Machine Learning (2006), eq. 4.109, taken
    in the forward pass as in Hsu et al., Liger Kernel (2024), section 3.2.
    """
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())
