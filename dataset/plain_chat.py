"""Conversations of roles and texts in our own chat template to ids and a loss mask, directly.

`plain_turns.py` writes the text, and leaves to `chat_format.py` what it cannot, which gives the
same for these; `chat_encoder.py` tells them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dataset.our_template import END, START
from dataset.plain_text import PlainText
from dataset.plain_turns import write_turns, writes_ours


@dataclass
class PlainChat:
    """A conversation as text. learned: numbers of the turns to learn from."""

    messages: list[dict]
    text: str
    learned: list[int]


class PlainChats:
    """Writes and encodes such conversations for a tokenizer that has our template."""

    def __init__(self, texts: PlainText):
        self.texts = texts
        self.start, self.end = texts.ids[START], texts.ids[END]
        self.head = texts.encode(["assistant\n"])[0]

    def write(self, messages: list[dict], loss_on: str) -> PlainChat | None:
        """A conversation as text; None: it says more than roles and texts, or a control token."""
        text = write_turns(messages, self.texts.added)
        if text is None:
            return None
        assistant = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        learned = assistant[-1:] if loss_on == "last" else assistant
        learned = [n for n in learned if messages[n].get("loss", True)]
        return PlainChat(messages, text, learned)

    def encode(self, chats: Sequence[PlainChat]) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of each; an empty mask: an answer begins inside of a token."""
        rows = self.texts.encode([chat.text for chat in chats])
        return [(ids, self._mask(ids, chat)) for ids, chat in zip(rows, chats, strict=True)]

    def _mask(self, ids: list[int], chat: PlainChat) -> list[int]:
        mask, end, turns = [0] * len(ids), -1, []
        for _ in chat.messages:
            first = ids.index(self.start, end + 1) + 1
            end = ids.index(self.end, first)
            turns.append((first, end))
        for first, end in (turns[n] for n in chat.learned):
            begin = first + len(self.head)
            if ids[first:begin] != self.head:  # its newline has merged with one of the answer
                return []
            mask[begin : end + 1] = [1] * (end + 1 - begin)
        return mask


def plain_chats(tokenizer, texts: PlainText) -> PlainChats | None:
    """What writes conversations directly, if the tokenizer's chat template is ours; else None."""
    return PlainChats(texts) if writes_ours(tokenizer, texts) else None
