"""Conversations to learn from -> ids and a loss mask, with whatever chat template there is.

Ordinary ones in our template are encoded by `plain_chat.py`. Tools, thinking, texts that spell
control tokens and all other templates are for `chat_format.py`, which gives the same for those.
"""

from collections.abc import Sequence
from functools import cached_property

from dataset.plain_chat import PlainChat, plain_chats
from dataset.plain_text import PlainText


class ChatEncoder:
    """Encodes the conversations of a data file.

    Raises:
        ValueError: the tokenizer is no fast BPE; it has no chat template, or one with a fault.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.plain = plain_chats(tokenizer, PlainText(tokenizer))
        if not self.plain:
            self.coder  # noqa: B018  # says what is wrong with the tokenizer before any row is read

    @cached_property
    def coder(self):
        """The `ChatCoder` for any conversation."""
        from dataset.chat_format import ChatCoder

        return ChatCoder(self.tokenizer)

    def read_chat(self, messages: list[dict], tools: list[dict] | None, loss_on: str = "all"):
        """A conversation as `encode` takes it; see `ChatCoder.read_chat`."""
        if self.plain and not tools and loss_on in ("all", "last"):
            if chat := self.plain.write(messages, loss_on):
                return chat
        return self.coder.read_chat(messages, tools, loss_on)

    def encode(self, chats: Sequence) -> list[tuple[list[int], list[int]]]:
        """(ids, mask) of each; the mask is 1 on what assistant turns say, see `ChatCoder.encode`."""
        encoded: list = [None] * len(chats)
        places = [n for n, chat in enumerate(chats) if isinstance(chat, PlainChat)]
        if self.plain:
            for n, row in zip(places, self.plain.encode([chats[n] for n in places]), strict=True):
                encoded[n] = row if row[1] else None
        if rest := [n for n, row in enumerate(encoded) if row is None]:
            others = [self._any_chat(chats[n]) for n in rest]
            for n, row in zip(rest, self.coder.encode(others), strict=True):
                encoded[n] = row
        return encoded

    def _any_chat(self, chat):
        """A conversation as the `ChatCoder` takes it."""
        if not isinstance(chat, PlainChat):
            return chat
        turns = [{**message, "loss": n in chat.learned} for n, message in enumerate(chat.messages)]
        return self.coder.read_chat(turns, None)
