"""Generation for many prompts at once, several completions of each."""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

from model.kv_cache import Decoder, KVCache
from model.read_prompts import read_prompts

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def generate_batch(
    model,
    prompts: list[list[int]],
    limits: list[int],
    sampler: Sampler,
    eos_token_id: int | None = None,
    samples: int = 1,
    batch_size: int = 64,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Complete prompts token by token; a finished completion costs no more work.

    Prompts are read in packs without padding, once for all their samples.

    Args:
        model: a MiniMindLM.
        prompts: token ids; prompt p has the rows p * samples to (p + 1) * samples - 1.
        limits: the most tokens for each prompt; with them it fits the model's max_seq_len.
        sampler: (logits (R, vocab) float32, row (R,), position (R,)) -> (R,) int64: the tokens at
            these positions of these rows' completions. Rows are in no order.
        eos_token_id: ends a completion.
        batch_size: prompts that are worked on at once.

    Yields:
        (row, position, token), (R,) int64 each: the next token of every row that goes on.
    """
    numbers = [number for number, limit in enumerate(limits) if limit > 0]
    if not numbers:
        return
    numbers.sort(key=lambda number: -len(prompts[number]))  # neighbours: one length
    longest = max(len(ids) + n for ids, n in zip(prompts, limits, strict=True))
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    rows = samples * min(batch_size, len(numbers))
    cache = KVCache(model.config, rows, longest, device, dtype)
    decoder = (model.make_decoder or Decoder)(model, cache)
    options = (decoder, prompts, limits, numbers, sampler, eos_token_id, samples)
    if len(numbers) > batch_size or decoder.keeps_rows:
        from model.generate_slots import generate_slots

        yield from generate_slots(*options)
    else:
        yield from generate_together(*options)


def generate_together(
    decoder: Decoder,
    prompts: list[list[int]],
    limits: list[int],
    numbers: list[int],
    sampler: Sampler,
    eos_token_id: int | None,
    samples: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The short form of `generate_batch`: all completions begin at once, and none takes a place.

    Args:
        decoder: with a cache of a row for each completion.
        numbers: of the prompts that want tokens, in the order of their rows in the cache.
    """
    device = decoder.cache.kv.device
    row = (torch.tensor(numbers).unsqueeze(1) * samples + torch.arange(samples)).flatten()
    left = torch.tensor([limits[number] for number in numbers]).repeat_interleave(samples)
    cache_rows = torch.arange(len(row)).view(-1, samples).T  # (samples, prompts)
    logits = read_prompts(decoder, [prompts[number] for number in numbers], cache_rows)
    logits, row = logits.repeat_interleave(samples, dim=0), row.to(device)
    for position in count():
        positions = torch.full_like(row, position)
        token = sampler(logits, row, positions)
        yield row, positions, token
        goes_on = left > position + 1
        if eos_token_id is not None:
            goes_on &= (token != eos_token_id).cpu()
        if not goes_on.all():
            kept = goes_on.nonzero().squeeze(1)
            if not len(kept):
                return
            decoder.cache.keep(kept)
            left = left[kept]
            row, token = (part[kept.to(device)] for part in (row, token))
        logits = decoder.step(token)
