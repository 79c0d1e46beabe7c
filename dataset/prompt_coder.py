"""Prompts to ids, and the ids of replies to text, with whatever chat template there is.

Ordinary prompts in our template are written by `plain_turns.py`. Tools, thinking, texts that spell
control tokens and all other templates are for `chat_format.py`, which gives the same for those.
"""

from collections.abc import Sequence
from functools import cached_property

from dataset.our_template import END
from dataset.plain_text import PlainText
from dataset.plain_turns import write_turns, writes_ours
from dataset.replies import decode_reply


class PromptCoder:
    """Encodes prompts and decodes what a model says to them.

    Attributes:
        end_of_turn: id of the token with which an assistant turn ends.
        ends: ids of all tokens that may end one.

    Raises:
        ValueError: the tokenizer is no fast BPE; it has no chat template, or one with a fault.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, PlainText(tokenizer)
        self.is_ours = writes_ours(tokenizer, self.texts)
        self.ends = [self.texts.ids[END]] if self.is_ours else self.general.ends
        self.end_of_turn = self.ends[0]

    @cached_property
    def general(self):
        """The `ChatCoder` for any conversation."""
        from dataset.chat_format import ChatCoder

        return ChatCoder(self.tokenizer)

    def encode_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Ids up to where the assistant is to speak; see `ChatCoder.encode_prompt`."""
        if self.is_ours and not tools:
            text = write_turns(messages, self.texts.added, is_prompt=True)
            if text is not None:
                return self.texts.backend.encode(text, add_special_tokens=False).ids
        return self.general.encode_prompt(messages, tools)

    def decode_reply(self, ids: Sequence[int]) -> str:
        """What a model wrote, as text; see `replies.decode_reply`."""
        return decode_reply(self.tokenizer, ids, self.ends)
