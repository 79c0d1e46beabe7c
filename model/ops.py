"""Operations of the model where time and memory go, each written so that what is not needed never exists."""

import ctypes
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model import native

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

    oneDNN prepares bfloat16 products by their shape, which takes milliseconds for every new one, and rows of documents
    hardly ever have the same length. With the step returned they grow by 3 % at most, and there are 32 lengths between
    one power of two and the next. `multiply` has other products where it can: 1.
    """
    whole = type(weight) is nn.Parameter  # not spread over processes, which have lengths of their own to keep
    if not whole or weight.device.type != "cpu" or autocast_dtype(weight) != torch.bfloat16:
        return 1
    if products(torch.bfloat16) is not None and weight.size(-1) % 32 == 0:
        return 1
    return 2 ** max(0, tokens.bit_length() - 6)


def round_up(number: int | Tensor, step: int) -> int | Tensor:
    """The next multiple of `step`; of each number in a tensor of integers."""
    return -(-number // step) * step


def kernels(x: Tensor, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The functions of ops.cpp for x, or a result in another dtype. None on a GPU, or where torch.compile makes ours.

    Nor are there any without a C++ compiler.
    """
    if torch.compiler.is_compiling() or not native.plain(x):
        return None
    return native.library("ops.cpp", dtype or x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, returned in the dtype of matrix products.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), eq. 4.
    """
    return add_and_norm(x, None, weight, eps)[1]


def add_and_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch, if there is one, and `rms_norm` of that. On a CPU its gradients are added in the same pass."""
    dtype = autocast_dtype(x)
    functions = kernels(x, dtype) if native.plain(weight) and x.dtype in (dtype, torch.float32) else None
    if branch is not None and (functions is None or branch.dtype != dtype or not native.plain(branch)):
        x, branch = x + branch, None
    if functions is None:
        return x, F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(dtype)
    return Norm.apply(x, branch, weight, eps, dtype, functions)


class Norm(torch.autograd.Function):
    """`add_and_norm` in one pass over memory, and its gradients in another."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, functions):
        x = total = x.contiguous()
        if branch is not None:
            branch, total = branch.contiguous(), torch.empty_like(x)
        gain, out, scales = weight.float(), torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[:-1])
        name, sizes = "norm_of_same" if x.dtype == dtype else "norm_of_floats", (scales.numel(), x.size(-1))
        native.call(getattr(functions, name), x, branch, total, gain, out, scales, *sizes, eps)
        ctx.function, ctx.sizes = getattr(functions, f"{name}_backward"), sizes
        ctx.has_branch, ctx.dtype = branch is not None, weight.dtype
        ctx.save_for_backward(total, gain, scales)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx, by_total: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, gain, scales = ctx.saved_tensors
        grad, by_total = grad.contiguous(), by_total if by_total is None else by_total.contiguous()
        by_x, by_gain, rounded = torch.empty_like(total), torch.empty_like(gain), None
        if ctx.has_branch and grad.dtype != total.dtype:
            rounded = torch.empty_like(grad)
        native.call(ctx.function, total, gain, scales, grad, by_total, by_x, rounded, by_gain, *ctx.sizes)
        by_branch = None if not ctx.has_branch else by_x if rounded is None else rounded
        return by_x, by_branch, by_gain.to(ctx.dtype), None, None, None


class Linear(nn.Linear):
    """x @ weight.T, as nn.Linear. On a CPU some products are made in other ways, where they are faster."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not native.plain(x, self.weight):
            return super().forward(x)
        dtype, training = autocast_dtype(x), torch.is_grad_enabled()
        if training and products(dtype) is not None:
            return Product.apply(x, self.weight, dtype)
        if not training and dtype == torch.float32 and x.dim() == 3 and x.size(1) == 1 and 8 <= x.size(0) <= 128:
            return (self.weight @ x.squeeze(1).T).T.contiguous().unsqueeze(1)  # a step of generation
        return super().forward(x)


def products(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of linear.cpp, where a CPU has instructions for products of a dtype other than float32."""
    functions = native.library("linear.cpp", dtype) if dtype == torch.bfloat16 else None
    return functions if functions is not None and functions.has_products() else None


class Product(torch.autograd.Function):
    """x @ weight.T by linear.cpp. The gradient of the weight is summed in float32, and not rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes, x = (x.dtype, weight.dtype), x.to(dtype)
        ctx.save_for_backward(x, weight)
        return torch.ops.minimind.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, by_x, by_weight = grad.reshape(-1, grad.size(-1)), None, None
        if ctx.needs_input_grad[1]:
            by_weight = torch.empty(weight.shape)
            sum_of_products(by_weight, grad, x.reshape(-1, x.size(-1)))
            by_weight = by_weight.to(ctx.dtypes[1])
        if ctx.needs_input_grad[0]:
            by_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            multiply(by_x.view(-1, x.size(-1)), grad, weight)
            by_x = by_x.to(ctx.dtypes[0])
        return by_x, by_weight, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: an operation that torch knows, so that `recomputed` can keep its result."""
    out = x.new_empty(*x.shape[:-1], len(weight))
    multiply(out.view(-1, len(weight)), x.reshape(-1, x.size(-1)), weight.T)
    return out


LIBRARY = torch.library.Library("minimind", "DEF")
LIBRARY.define("linear(Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("linear", linear, "CPU")
SLOW.append(torch.ops.minimind.linear.default)


def multiply(out: Tensor, x: Tensor, matrix: Tensor, x2: Tensor | None = None, matrix2: Tensor | None = None) -> None:
    """out (M, N) = x (M, K) @ matrix (K, N), + x2 @ matrix2 if there are these; a matrix may have another dtype.

    A matrix in float32 is rounded on the way, where a CPU can: linear.cpp.
    """
    functions, (K, N) = products(x.dtype) if x.device.type == "cpu" else None, matrix.shape
    if functions is None or matrix.dtype != torch.float32 or K % 32 or N % 32:
        torch.mm(x, matrix.to(x.dtype), out=out)
        if x2 is not None:
            out.addmm_(x2, matrix2.to(x.dtype))
    elif matrix.is_contiguous():
        pair = (None, None) if x2 is None else (x2.contiguous(), matrix2)
        native.call(functions.linear_by_x, x.contiguous(), matrix, *pair, out, len(x), N, K)
    else:
        native.call(functions.linear, x.contiguous(), matrix.T.contiguous(), out, len(x), N, K)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Source: Shazeer, GLU Variants Improve Transformer (2020), eq. 6."""
    functions = kernels(gate)
    return F.silu(gate) * up if functions is None else Gated.apply(gate, up, functions)


class Gated(torch.autograd.Function):
    """`swiglu` in one pass over memory, and its gradients in another."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, functions) -> Tensor:
        gate, up, out = gate.contiguous(), up.contiguous(), torch.empty(gate.shape, dtype=gate.dtype)
        native.call(functions.swiglu, gate, up, out, gate.numel())
        ctx.functions = functions
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
        native.call(ctx.functions.swiglu_backward, gate, up, grad.contiguous(), by_gate, by_up, gate.numel())
        return by_gate, by_up, None


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
    functions = kernels(x)
    if functions is not None and cos.shape[:-1] == (*x.shape[:-2], 1):  # angles for all heads of a token
        x, out, sizes = x.contiguous(), torch.empty(x.shape, dtype=x.dtype), (x.size(-2), cos.size(-1))
        native.call(functions.rotate, x, cos.contiguous(), sin.contiguous(), out, x.shape[:-2].numel(), *sizes)
        return out
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    (a, b), out = x.chunk(2, dim=-1), torch.empty_like(x)
    left, right = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, H, D) by the angle of their position.

    Source: Su et al., RoFormer (2021), eq. 34, in the half-split layout of the Llama and Qwen weights.
    """
    if torch.compiler.is_compiling():
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return Rotation.apply(x, cos, sin)


def sum_of_products(total: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """total (M, N) float32 = or += a.T @ b; a (K, M), b (K, N)."""
    if a.dtype == torch.float32:
        torch.addmm(total, a.T, b, beta=int(add), out=total)
    elif a.device.type == "cuda":
        torch.addmm(total, a.T, b, beta=int(add), out_dtype=torch.float32, out=total)
    elif (functions := products(a.dtype)) is not None:
        sizes = len(a), a.size(1), b.size(1)
        native.call(functions.linear_by_weight, a.contiguous(), b.contiguous(), total, *sizes, int(add))
    else:  # some rows at a time, then cast
        rows = max(1, 8 * BLOCK // b.size(1))
        for part, columns in zip(total.split(rows), a.split(rows, dim=1), strict=True):
            product = columns.T @ b
            part.add_(product) if add else part.copy_(product)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], summed, in float32; the logits (K, vocab) become its gradient."""
    functions, losses = kernels(logits), torch.empty(len(logits), device=logits.device)
    if functions is not None:
        native.call(functions.cross_entropy, logits, targets, losses, *logits.shape)
        return losses.sum()
    step = max(1, BLOCK // logits.size(1)) if logits.device.type == "cpu" else max(1, len(logits))
    targets = targets.unsqueeze(1)
    for block, target, loss in zip(*(t.split(step) for t in (logits, targets, losses)), strict=True):
        log_probs = block.log_softmax(dim=1, dtype=torch.float32)
        at_target = log_probs.gather(1, target)
        torch.neg(at_target.squeeze(1), out=loss)
        block.copy_(log_probs.exp_().scatter_add_(1, target, -torch.ones_like(at_target)))
        del log_probs  # before there is a next one
    return losses.sum()


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. The gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        head, rows = weight.to(x.dtype), max(LEAST, CHUNK[x.device.type] // len(weight))
        loss, logits = torch.zeros((), device=x.device), x.new_empty(min(rows, len(x)), len(weight))
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
        for at in range(0, len(x), rows):
            part = x[at : at + rows]
            chunk = torch.mm(part, head.T, out=logits[: len(part)])
            loss += cross_entropy(chunk, targets[at : at + rows])
            if grad_x is not None:
                torch.mm(chunk, head, out=grad_x[at : at + rows])
            if grad_weight is not None:
                sum_of_products(grad_weight, chunk, part, add=True)
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
