"""Reading prompts into a cache, packed one behind the other, before they are completed."""

import torch
from torch import Tensor

from model.kv_cache import Decoder


def read_prompts(decoder: Decoder, prompts: list[list[int]], rows: Tensor) -> Tensor:
    """Fill rows (copies, prompts) of the cache; returns the logits behind each prompt."""
    logits, begin, device = [], 0, decoder.cache.kv.device
    while begin < len(prompts):
        end, tokens = begin, 0
        while end < len(prompts) and (
            end == begin or tokens + len(prompts[end]) <= decoder.prefill_tokens
        ):
            tokens += len(prompts[end])
            end += 1
        lens = [len(ids) for ids in prompts[begin:end]]
        decoder.cache.prompt_rows = rows[:, begin:end]
        last = (torch.tensor(lens).cumsum(0) - 1).to(device)
        ids = torch.tensor([sum(prompts[begin:end], [])], device=device)
        logits.append(decoder.read(ids, lens, last))
        begin = end
    return torch.cat(logits)
