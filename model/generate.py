"""Generation: token by token, as ids and as text."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.kv_cache import Decoder, KVCache


@torch.no_grad()
def stream(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 512,
    eos_token_id: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Generate token by token: read the prompt, then choose a token and read that, again and again.

    Args:
        model: a MiniMindLM.
        input_ids: (B, T) int64, prompts of unequal length padded on the left.
        attention_mask: (B, T) 0/1, needed where there is padding.
        max_new_tokens: at most so many; generation also ends when the context is full.
        eos_token_id: ends a row; a row that has ended yields eos until all have.
        temperature, top_k, top_p, generator: see `sampling.sample`; 0 takes the likeliest token.
        repetition_penalty: > 1 lowers the logits of tokens already in the context; 1: off.

    Yields: (B,) int64, the next token of every row.
    """
    (B, T), context = input_ids.shape, model.config.max_seq_len
    if T > context:
        raise ValueError(f"prompt of {T} tokens is longer than max_seq_len {context}")
    limit = min(max_new_tokens, context - T)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    if B != 1 or attention_mask is not None or repetition_penalty != 1.0:
        from model.stream_rows import stream_rows

        sampling |= {"repetition_penalty": repetition_penalty}
        yield from stream_rows(model, input_ids, attention_mask, limit, eos_token_id, **sampling)
        return
    if limit < 1:
        return
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, 1, T + limit, device, dtype)
    decoder = (model.make_decoder or Decoder)(model, cache)
    logits = decoder.read(input_ids.to(device), [T], torch.tensor([T - 1], device=device))
    while True:
        if temperature <= 0.0:
            token = logits.max(dim=-1).indices  # three times as fast as argmax
        else:
            from model.sampling import sample

            token = sample(logits, **sampling)
        yield token
        limit -= 1
        if limit == 0 or eos_token_id is not None and token.item() == eos_token_id:
            return
        logits = decoder.step(token)


def stream_text(
    model,
    decode: Callable[[list[int]], str],
    prompt: list[int],
    reply_ids: list[int] | None = None,
    **sampling,
) -> Iterator[str]:
    """The reply to a prompt, a piece per token, up to the end token, which is left out.

    A character whose bytes are spread over several tokens comes with its last one, the pieces
    before are empty: the reply so far is decoded as a whole, and what is new waits while its end is
    not yet a character.

    Args:
        model: a MiniMindLM.
        decode: ids of a reply -> its text.
        prompt: token ids.
        reply_ids: a list that the ids of the reply are appended to.
        sampling: the arguments of `stream`.
    """
    ids = [] if reply_ids is None else reply_ids
    text, shown = "", 0
    input_ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    for token in model.stream(input_ids, **sampling):
        if token.item() == sampling.get("eos_token_id"):
            break
        ids.append(token.item())
        text = decode(ids)
        whole = shown if text.endswith("\ufffd") else len(text)
        yield text[shown:whole]
        shown = whole
    yield text[shown:]
