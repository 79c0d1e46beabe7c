"""Replies: the text of what a model wrote, and what it says without its thinking."""

from collections.abc import Collection, Sequence

THINK, END_THINK = "<think>", "</think>"


def decode_reply(tokenizer, ids: Sequence[int], ends: Collection[int]) -> str:
    """What a model wrote, as text: all up to one of `ends`, ids of tokens; padding is left out.

    Markers such as <think> stay, whether this tokenizer calls them special or not.
    """
    ids = list(ids)
    stop = next((n for n, token in enumerate(ids) if token in ends), len(ids))
    ids = [token for token in ids[:stop] if token != tokenizer.pad_token_id]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def final_answer(text: str) -> str:
    """What a reply, or a reference answer, says behind its thinking, stripped."""
    return text.rpartition(END_THINK)[2].strip()
