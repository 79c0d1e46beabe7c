"""What generation needs: the cache of keys and values, drawing the next token, turning tokens into text."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, preallocated: (2, n_layers, B, n_kv_heads, capacity, head_dim)."""

    def __init__(self, config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (2, config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held, the same for every layer between two forward passes

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, n_kv_heads, T, head_dim) behind what is held; returns all keys and values of the layer."""
        held = self.kv[:, layer, :, :, : self.length + k.size(2)]
        held[0, :, :, self.length :], held[1, :, :, self.length :] = k, v
        return held[0], held[1]


def sample(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a token per row of logits (B, vocab) float32; returns (B,) int64.

    Source: top-p is nucleus sampling, Holtzman et al. (2020), eq. 3: the smallest set of probability >= top_p.
    """
    if temperature <= 0.0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -math.inf)
    if top_p < 1.0:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what comes before a token already suffices
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def stream_text(model, tokenizer, prompt: list[int], **sampling) -> Iterator[str]:
    """The reply to a prompt, a piece per token, up to the end token, which is left out.

    A character whose bytes are spread over several tokens comes with its last one, the pieces before are empty: the
    reply so far is decoded as a whole, and what is new waits while its end is not yet a character.

    Args:
        model: a MiniMindLM.
        prompt: token ids.
        sampling: the arguments of `MiniMindLM.stream`.
    """
    ids, text, shown = [], "", 0
    input_ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    for token in model.stream(input_ids, **sampling):
        if token.item() == sampling.get("eos_token_id"):
            break
        ids.append(token.item())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        whole = shown if text.endswith("\ufffd") else len(text)
        yield text[shown:whole]
        shown = whole
    yield text[shown:]
