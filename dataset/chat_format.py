"""Conversations to token ids and a loss mask, with whatever chat template a tokenizer brings.

    row (MiniMind, ShareGPT, Alpaca, OpenAI) -> chat_rows.normalise_row -> messages, tools
    messages, tools -> ChatCoder.encode_chats -> ids, and a mask that is 1 on what the model says
    messages, tools -> ChatCoder.encode_prompt -> ids up to where the model is to speak
    ids that a model wrote -> ChatCoder.decode_reply -> text

`chatml.py` writes what our own template makes of roles and texts. For all else `template_reader.py`
finds out which part of the text that a template writes is control text, and what an assistant turn
is. `text_encoder.py` encodes the text so that no content can spell a control token. For ordinary
text the ids are those of `tokenizer.apply_chat_template`.
"""

from collections.abc import Sequence
from functools import cached_property

from dataset.chatml import END, Chat, chatml_of
from dataset.replies import decode_reply
from dataset.text_encoder import TextEncoder, text_encoder


class ChatCoder:
    """What every conversation needs of a tokenizer, looked up once and checked. Can be pickled.

    Attributes:
        plain: encodes text that is no chat; control tokens that it spells stay text.
        chatml: writes conversations of our template; None: the tokenizer has another one.
        end_of_turn: id of the token with which an assistant turn ends.
        ends, end_names: ids of all tokens that may end one, and their names in texts of prompts.

    Raises:
        ValueError: the tokenizer is no fast BPE; it has no chat template, or one with a fault.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.plain: TextEncoder = text_encoder(tokenizer)
        self.chatml = chatml_of(tokenizer, self.plain)
        ends = [END] if self.chatml else self.readers[0].manner.ends
        self.ends = [self.plain.ids[token] for token in ends]
        self.end_of_turn = self.ends[0]
        self.end_names = tuple(self.plain.names[token] for token in ends)
        self.control_ids = frozenset(self.plain.ids.values())

    @cached_property
    def readers(self) -> tuple:
        """Two `TemplateReader`s of any chat template: without tools, and with."""
        from dataset.template_reader import open_readers

        return open_readers(self.tokenizer, self.plain)

    def read_chat(
        self, messages: list[dict], tools: list[dict] | None, loss_on: str = "all"
    ) -> Chat:
        """A conversation as text; its spans are the turns to learn from.

        Args:
            messages, tools: as `normalise_row` gives them; a turn with "loss": False is read, but
                not learned from.
            loss_on: 'all' assistant turns or the 'last' one.

        Raises:
            ValueError: what the chat template does to which turn, so that it cannot be learned.
        """
        if loss_on not in ("all", "last"):
            raise ValueError(f"loss_on must be 'all' or 'last', found {loss_on!r}")
        chat = self._read(messages, tools)
        turns = list(chat.spans)[-1 if loss_on == "last" else 0 :]
        chat.spans = {turn: chat.spans[turn] for turn in turns if messages[turn].get("loss", True)}
        return chat

    def encode(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """Encode many conversations at once, which makes millions of rows quick.

        Returns:
            (ids, mask) of each, of equal length; the mask is 1 on what assistant turns say, their
            end-of-turn tokens included. A token that begins in the text before counts, too.
        """
        rows = self.plain.batch([chat.text for chat in chats])
        masks = [_mask(ids, chat) for ids, chat in zip(rows, chats, strict=True)]
        if not all(masks):
            from dataset.character_masks import fill_masks

            fill_masks(masks, chats, self.plain)
        return list(zip(rows, masks, strict=True))

    def encode_chats(
        self, chats: Sequence[tuple], loss_on: str = "all"
    ) -> list[tuple[list[int], list[int]]]:
        """`read_chat` and `encode`: (ids, mask) of each (messages, tools)."""
        return self.encode([self.read_chat(*chat, loss_on) for chat in chats])

    def encode_prompt(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        thinking: bool | None = None,
    ) -> list[int]:
        """Ids of a conversation up to where the assistant is to speak.

        Args:
            messages: those of `read_chat`; what a model itself wrote has "from_model": True, and
                its control tokens are control tokens again.
            thinking: the template's enable_thinking; None: what it does by itself.

        Raises:
            ValueError: the chat template refuses the conversation, or does not write all of it.
        """
        return self.plain(self.prompt_text(messages, tools, thinking))

    def prompt_text(self, messages, tools=None, thinking: bool | None = None) -> str:
        """What `encode_prompt` encodes: text in which control tokens have their random names."""
        flags = {} if thinking is None else {"enable_thinking": thinking}
        return self._read(messages, tools, add_generation_prompt=True, **flags).text

    def _read(self, messages: list[dict], tools: list[dict] | None, **flags) -> Chat:
        if self.chatml and self.chatml.can_write(messages, tools):
            return self.chatml.write(messages, **flags)
        return self.readers[bool(tools)].read(messages, tools, **flags)

    def opening(self, thinking: bool | None = None) -> str:
        """What a prompt says already of the reply: "<think>\\n", or nothing."""
        return (self.chatml or self.readers[0].template).opening(thinking)

    def decode_reply(self, ids: Sequence[int]) -> str:
        """What a model wrote, as text; see `replies.decode_reply`."""
        return decode_reply(self.tokenizer, ids, self.ends)


def _mask(ids: list[int], chat: Chat) -> list[int]:
    """The mask of a row by its control tokens; []: that needs each token's characters."""
    places, at = [], -1
    try:
        for token in chat.controls:
            at = ids.index(token, at + 1)
            places.append(at)
    except ValueError:  # a word beside it made it text
        return []
    mask = [0] * len(ids)
    for _, _, mark in chat.spans.values():
        if mark is None:
            return []
        first, last = places[mark.after] + 1, places[mark.end]
        begin = first + len(mark.head)
        if ids[first:begin] != mark.head:  # its end has merged with what is said
            return []
        mask[begin : last + 1] = [1] * (last + 1 - begin)
    return mask
