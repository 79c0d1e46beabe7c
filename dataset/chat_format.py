"""Conversations to token ids and a loss mask, with whatever chat template a tokenizer brings.

    row (MiniMind, ShareGPT, Alpaca, OpenAI) -> chat_rows.normalise_row -> messages, tools
    messages, tools -> ChatCoder.encode_chats -> ids, and a mask that is 1 on what the model says
    messages, tools -> ChatCoder.encode_prompt -> ids up to where the model is to speak
    ids that a model wrote -> ChatCoder.decode_reply -> text

`template_reader.py` finds out which part of the text that a template writes is control text, and
what an assistant turn is; `text_encoder.py` encodes the text so that no content can spell a control
token. For ordinary text the ids are those of `tokenizer.apply_chat_template`.
"""

from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Encoding

from dataset.template_manner import OTHER, Template
from dataset.template_reader import Chat, TemplateReader
from dataset.text_encoder import TextEncoder, text_encoder


class ChatCoder:
    """What encoding and decoding chats needs of a tokenizer; made by `chat_coder`. Can be pickled.

    Attributes:
        plain: encodes text that is no chat; control tokens that it spells stay text.
        end_of_turn: id of the token with which an assistant turn ends.
        ends: ids of all tokens that may end one.
    """

    def __init__(self, tokenizer, reader: TemplateReader, tool_reader: TemplateReader):
        self.tokenizer = tokenizer
        self.reader, self.tool_reader = reader, tool_reader
        self.plain: TextEncoder = reader.encoder
        self.ends = [self.plain.ids[token] for token in reader.manner.ends]
        self.end_of_turn = self.ends[0]
        self._end_names = tuple(self.plain.names[token] for token in reader.manner.ends)
        self.control_ids = frozenset(self.plain.ids.values())

    # ----------------------------------------------------------------------------------------------
    # Conversations
    # ----------------------------------------------------------------------------------------------

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
        reader = self.tool_reader if tools else self.reader
        chat = reader.read(messages, tools)
        turns = list(chat.spans)[-1 if loss_on == "last" else 0 :]
        spans = {turn: chat.spans[turn] for turn in turns if messages[turn].get("loss", True)}
        return replace(chat, spans=spans)

    def encode(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """Encode many conversations at once, which makes millions of rows quick.

        Returns:
            (ids, mask) of each, of equal length; the mask is 1 on what assistant turns say, their
            end-of-turn tokens included. A token that begins in the text before counts, too.
        """
        rows = self.plain.batch([chat.text for chat in chats])
        masks = [self._mask(ids, chat) for ids, chat in zip(rows, chats, strict=True)]
        odd = [chat for mask, chat in zip(masks, chats, strict=True) if mask is None]
        encodings = iter(self.plain.encodings([chat.text for chat in odd]))
        others = (self._mask_of_spans(next(encodings), chat) for chat in odd)
        masks = [next(others) if mask is None else mask for mask in masks]
        return list(zip(rows, masks, strict=True))

    def _mask(self, ids: list[int], chat: Chat) -> list[int] | None:
        """The mask of a row by its control tokens; None: that needs each token's characters."""
        places, at = [], -1
        try:
            for token in chat.controls:
                at = ids.index(token, at + 1)
                places.append(at)
        except ValueError:  # a word beside it made it text
            return None
        mask = [0] * len(ids)
        for _, _, mark in chat.spans.values():
            if mark is None:
                return None
            first, last = places[mark.after] + 1, places[mark.end]
            begin = first + len(mark.head)
            if ids[first:begin] != mark.head:  # its end has merged with what is said
                return None
            mask[begin : last + 1] = [1] * (last + 1 - begin)
        return mask

    def _mask_of_spans(self, encoding: Encoding, chat: Chat) -> list[int]:
        """The mask of a row by the characters that its tokens stand for."""
        ids = encoding.ids
        mask = [0] * len(ids)
        for begin, end, _ in chat.spans.values():
            first = encoding.char_to_token(begin)
            at = begin
            while first is None and at < end:  # a blank that this tokenizer leaves out
                at += 1
                first = encoding.char_to_token(at)
            last = encoding.char_to_token(end - 1)
            if ids[first] in self.control_ids and encoding.token_to_chars(first)[0] < begin:
                first += 1  # a control token that takes the blanks behind it
            mask[first : last + 1] = [1] * (last + 1 - first)
        return mask

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
        reader = self.tool_reader if tools else self.reader
        flags = {} if thinking is None else {"enable_thinking": thinking}
        return reader.read(messages, tools, add_generation_prompt=True, **flags).text

    def ends_turn(self, text: str) -> bool:
        """Whether such a text begins with an end-of-turn token."""
        return text.startswith(self._end_names)

    # ----------------------------------------------------------------------------------------------
    # Replies
    # ----------------------------------------------------------------------------------------------

    def opening(self, thinking: bool | None = None) -> str:
        """What a prompt says already of the reply: "<think>\\n", or nothing."""
        return self.reader.template.opening(thinking)

    def decode_reply(self, ids: Sequence[int]) -> str:
        """What a model wrote, as text: all up to its end-of-turn token; padding is left out.

        Markers such as <think> stay, whether this tokenizer calls them special or not.
        """
        ids = list(ids)
        stop = next((n for n, token in enumerate(ids) if token in self.ends), len(ids))
        pad = self.tokenizer.pad_token_id
        ids = [token for token in ids[:stop] if token != pad]
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def chat_coder(tokenizer) -> ChatCoder:
    """Look up once what every conversation needs, and check it.

    Raises:
        ValueError: the tokenizer is no fast BPE; it has no chat template, or one with a fault.
    """
    from dataset.template_checks import check_battery

    encoder = text_encoder(tokenizer)
    place = str(getattr(tokenizer, "template_place", "the tokenizer's chat template"))
    templates = tokenizer.chat_template
    if not templates:
        fault = "there is no chat template (chat_template.jinja, or in tokenizer_config.json)"
        folder = getattr(tokenizer, "folder", "") or tokenizer.name_or_path or "the tokenizer"
        raise ValueError(f"{folder}: {fault}; {OTHER}")
    if isinstance(templates, str):
        templates = {"default": templates}
    if "default" not in templates:
        found = ", ".join(templates)
        raise ValueError(f"{place}: no template is named 'default' (found: {found}); {OTHER}")
    variables = dict(tokenizer.special_tokens_map)
    reader = TemplateReader(Template(templates["default"], place, variables), encoder)
    tool_reader = reader
    if "tool_use" in templates:
        tool_reader = TemplateReader(Template(templates["tool_use"], place, variables), encoder)
    coder = ChatCoder(tokenizer, reader, tool_reader)
    check_battery(coder, place)
    return coder
