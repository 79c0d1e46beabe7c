"""The head and its loss together: logits are made once, for a chunk of tokens at a time."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import native
from kernels.linear import CACHED, FastLinear, sum_of_products
from model.lm import Head

# Logits that exist at once, 64 or 72 MiB in float32. The figures of benchmarks/results are with
# these: xeon_amx.json and h200.json, parts training and head_memory of benchmarks/speed.
CHUNK = {"cpu": 16 * 2**20, "cuda": 18 * 2**20}
LEAST_TOKENS = 64  # fewer would not be worth a pass over the weights


class FastHead(Head, FastLinear):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not native.is_local(x, self.weight):
            return super().forward(x, targets)
        return linear_cross_entropy(x.to(native.autocast_dtype(x)), self.weight, targets)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(x @ weight.T)[target], summed over tokens.

    Args:
        x: (K, dim), in the dtype of the matrix products; K may be 0.
        weight: (vocab, dim) of the head, in any dtype. Its gradient is summed in float32.
        targets: (K,) int64.

    Returns: float32 scalar, to be differentiated once.
    Source: the gradient softmax - one_hot of Bishop, Pattern Recognition and Machine Learning
    (2006), eq. 4.109, taken in the forward pass as in Hsu et al., Liger Kernel (2024), section 3.2.
    """
    return LinearCrossEntropyFunction.apply(x, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        head, device = weight.to(x.dtype), x.device
        rows = max(LEAST_TOKENS, CHUNK[device.type] // len(weight))
        loss, logits = torch.zeros((), device=device), x.new_empty(min(rows, len(x)), len(weight))
        grad_x = torch.empty_like(x) if with_gradients else None
        grad_weight = None
        if with_gradients and weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
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


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], summed; the logits (K, vocab) become its gradient."""
    functions, losses = native.functions_for(logits), torch.empty(len(logits), device=logits.device)
    if functions is not None:
        check_targets(targets, logits.size(1))
        functions.cross_entropy(logits, targets.contiguous(), losses, *logits.shape)
        return losses.sum()
    on_cpu = logits.device.type == "cpu"
    step = max(1, CACHED // logits.size(1) if on_cpu else len(logits))
    targets = targets.unsqueeze(1)
    for block, target, loss in zip(
        *(t.split(step) for t in (logits, targets, losses)), strict=True
    ):
        log_probs = block.log_softmax(dim=1, dtype=torch.float32)
        at_target = log_probs.gather(1, target)
        torch.neg(at_target.squeeze(1), out=loss)
        block.copy_(log_probs.exp_().scatter_add_(1, target, -torch.ones_like(at_target)))
        del log_probs  # before there is a next one
    return losses.sum()


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """C++ reads the logit of a target wherever it would lie."""
    low, high = (int(end) for end in targets.aminmax())
    if low < 0 or high >= vocab_size:
        raise IndexError(f"targets {low} to {high} do not fit a vocabulary of {vocab_size} entries")
