"""The loss of a language model: cross-entropy of the next token, with little memory for logits."""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**24  # numbers that exist at once: 64 MiB in float32


def chunk_size(vocab_size: int) -> int:
    """Tokens whose logits exist at once."""
    return max(64, MAX_LOGITS // vocab_size)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(x @ weight.T)[target], summed over tokens; a float32 scalar.

    Logits exist for a chunk of tokens at a time, and once more in the backward pass.

    Args:
        x: (K, C); K may be 0.
        weight: (vocab, C) of the head.
        targets: (K,) int64.
    """

    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    size = chunk_size(len(weight))
    chunks = zip(x.split(size), targets.split(size), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
