"""Masks by the characters that tokens stand for, where control tokens do not tell."""

from collections.abc import Sequence

from tokenizers import Encoding

from dataset.chatml import Chat
from dataset.text_encoder import TextEncoder


def fill_masks(masks: list[list[int]], chats: Sequence[Chat], encoder: TextEncoder) -> None:
    """Replace the masks that are empty.

    Such a conversation has an assistant turn that begins inside of a token (this tokenizer merges
    the newline of its header with one of the answer), or a control token that a word beside it made
    text.
    """
    places = [n for n, mask in enumerate(masks) if not mask]
    texts = [chats[n].text for n in places]
    control = frozenset(encoder.ids.values())
    encodings = encoder.backend.encode_batch(texts, add_special_tokens=False)
    for n, encoding in zip(places, encodings, strict=True):
        masks[n] = _mask(encoding, chats[n], control)


def _mask(encoding: Encoding, chat: Chat, control: frozenset[int]) -> list[int]:
    ids = encoding.ids
    mask = [0] * len(ids)
    for begin, end, _ in chat.spans.values():
        first = encoding.char_to_token(begin)
        at = begin
        while first is None and at < end:  # a blank that this tokenizer leaves out
            at += 1
            first = encoding.char_to_token(at)
        last = encoding.char_to_token(end - 1)
        if ids[first] in control and encoding.token_to_chars(first)[0] < begin:
            first += 1  # a control token that takes the blanks behind it
        mask[first : last + 1] = [1] * (last + 1 - first)
    return mask
