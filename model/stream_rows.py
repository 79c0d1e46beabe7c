"""`generate.stream` of several rows, or with a penalty on what is there already."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.generate_batch import generate_batch
from model.sampling import make_sampler


def stream_rows(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    limit: int,
    eos_token_id: int | None,
    **sampling,
) -> Iterator[Tensor]:
    """As `generate.stream`, of several rows: (B,) int64, the next token of each.

    Args:
        limit: the most tokens of a row.
        sampling: see `sampling.make_sampler`.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
    sampler = make_sampler(prompts, model.config.vocab_size, input_ids.device, **sampling)
    limits = [limit] * len(prompts)
    options = {"eos_token_id": eos_token_id, "batch_size": len(prompts)}
    for row, _, token in generate_batch(model, prompts, limits, sampler, **options):
        tokens = input_ids.new_full((len(prompts),), 0 if eos_token_id is None else eos_token_id)
        tokens[row] = token
        yield tokens
