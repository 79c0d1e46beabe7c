"""Which characters of a conversation's text are control text, and whose the others are.

A chat template is a program: a conversation goes in, one text comes out, and nothing says what in
it is control text and what is content. So the template is rendered with stand-ins, random words
that no text can contain, in place of every text that a row brings. What comes out is a `Layout`:
pieces of control text with slots between them. Filled with the texts, it gives what the template
gives; and the control text before and behind the slots of an assistant turn says where that turn
begins and ends. The layout depends on the shape of a conversation alone (its roles and fields),
so of a million rows of one shape only the first is rendered.

Where a template looks into the texts (`template_literals.py`), the filled layout is compared to the
letter with what the template itself makes of the row.
"""

import itertools
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from dataset.chatml import Mark
from dataset.replies import END_THINK

NONCE = secrets.token_hex(8)
SLOT = re.compile(rf'{NONCE}(\d+)(\\*)"{NONCE}')  # a backslash: the slot is inside a JSON string
HIDDEN = ("loss", "from_model")  # fields of a message that are not for the template

# Public reasoning data keeps the thinking inside the content, most often in exactly this shape.
THINKING = {
    "exact": re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL),
    "loose": re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL),
    "none": re.compile("(?!)"),
}


def stand_in(n: int) -> str:
    return f'{NONCE}{n}"{NONCE}'


@dataclass
class Layout:
    """The text of all conversations of one shape.

    pieces: control text; between pieces i and i + 1 is slot i. renamed: the same for the encoder.
    slots: for each, which of the texts it holds, and how often that is escaped as JSON.
    spans: what each assistant turn says, by its number.
    controls: ids of the control tokens in the pieces.
    verified: a row of this shape was compared with what the template gives.
    """

    pieces: list[str]
    renamed: list[str]
    slots: list[tuple[int, int]]
    spans: dict[int, "Span"] = field(default_factory=dict)
    controls: list[int] = field(default_factory=list)
    verified: bool = False

    def fill(self, pieces: list[str], values: list[str]) -> list[str]:
        """The pieces, plain or renamed, with the texts of the slots between them."""
        parts = [pieces[0]]
        for (n, depth), piece in zip(self.slots, pieces[1:], strict=True):
            text = values[n]
            for _ in range(depth):
                text = json.dumps(text, ensure_ascii=False)[1:-1]
            parts.append(text)
            parts.append(piece)
        return parts


@dataclass(frozen=True)
class Span:
    """What an assistant turn says, from its first to its last slot and around them.

    begin: character in the renamed piece before the first slot. end: in that behind the last one.
    mark: None: there is no control token before it in its piece.
    """

    first: int
    begin: int
    last: int
    end: int
    mark: Mark | None


@dataclass(frozen=True)
class Cutting:
    """A way to cut a conversation into stand-ins.

    thinking: the shape of answers in which "<think>" and "</think>" are control text, and what is
        between and behind them are texts; in other answers they are text, too.
    empty: an answer without text or call is a text of no characters; else it is left as it is.
    leaves: all strings inside of tools and calls are texts; else those that spell a control token.
    text_arguments: the template wants the arguments of a call as JSON text.
    """

    thinking: str = "none"
    empty: bool = True
    leaves: bool = True
    text_arguments: bool = False


class Cut:
    """A conversation with stand-ins, and the texts that they stand for.

    values: the texts. owners: for each, its turn (None: the tools) and its field.

    Args:
        tokens: finds control tokens.
        trims: white space at the ends of a text is not a part of it, so that a template that trims
            it shows.
    """

    def __init__(
        self,
        messages: list[dict],
        tools: list | None,
        way: Cutting,
        tokens: re.Pattern,
        trims: bool,
    ):
        self.way, self.tokens, self.trims = way, tokens, trims
        self.values: list[str] = []
        self.owners: list[tuple[int | None, str]] = []
        self.messages = [self._message(n, message) for n, message in enumerate(messages)]
        self.tools = [self._named(tool, None, "tool") for tool in tools] if tools else None

    def _put(self, text: str, turn: int | None, name: str, empty: bool = False) -> str:
        value = text.strip()
        if not value and not empty:
            return text
        mark = stand_in(len(self.values))
        self.values.append(value if self.trims else text)
        self.owners.append((turn, name))
        if value == text or not self.trims:
            return mark
        at = len(text) - len(text.lstrip())
        return f"{text[:at]}{mark}{text[at + len(value) :]}"

    def _message(self, n: int, message: dict) -> dict:
        speaks = message["role"] == "assistant"
        shown = {}
        for name, value in message.items():
            if name == "content" and message.get("from_model"):
                pass  # what a model wrote says its control tokens itself: it is control text
            elif name == "content" and isinstance(value, str):
                empty = speaks and self.way.empty and not message.get("tool_calls")
                if speaks and (parts := THINKING[self.way.thinking].fullmatch(value)):
                    thought = self._put(parts[1], n, "reasoning_content", self.way.empty)
                    answer = self._put(parts[2], n, name, empty)
                    begin, end = value[: parts.start(1)], value[parts.end(1) : parts.start(2)]
                    value = f"{begin}{thought}{end}{answer}"
                else:
                    value = self._put(value, n, name, empty)
            elif name == "reasoning_content":
                value = self._put(value, n, name)
            elif name == "tool_calls":
                value = [self._named(as_call(call), n, "tool_calls") for call in value]
                value = [as_call(call, self.way.text_arguments) for call in value]
            elif name != "role":
                if name in HIDDEN or value is None:
                    continue
                value = self._leaf(value, n, name, every=False)
            shown[name] = value
        return shown

    def _named(self, item: dict, turn: int | None, name: str) -> dict:
        """A tool or a call; its name, which no template looks at, is always a text."""
        shown = {}
        for key, value in item.items():
            if key == "function" and isinstance(value, dict):
                value = self._named(value, turn, name)
            elif key == "name" and isinstance(value, str):
                value = self._put(value, turn, f"{name} name")
            else:  # the id and the type of a call are for the template, which counts their letters
                every = self.way.leaves and key not in ("id", "type")
                value = self._leaf(value, turn, name, every)
            shown[self._key(key, turn, name)] = value
        return shown

    def _leaf(self, value, turn: int | None, name: str, every: bool):
        if isinstance(value, str):
            spells = every or self.tokens.search(value)
            return self._put(value, turn, name) if spells else value
        if isinstance(value, dict):
            return {
                self._key(key, turn, name): self._leaf(item, turn, name, every)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._leaf(item, turn, name, every) for item in value]
        return value

    def _key(self, key: str, turn: int | None, name: str) -> str:
        return self._put(key, turn, name) if self.tokens.search(key) else key


def as_call(call: dict, text_arguments: bool = False) -> dict:
    """A tool call in the shape that templates read, OpenAI's."""
    if "function" not in call:
        function = {name: value for name, value in call.items() if name != "id"}
        known = {"id": call["id"]} if "id" in call else {}
        call = {"type": "function", **known, "function": function}
    if text_arguments and not isinstance(call["function"]["arguments"], str):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        call = {**call, "function": {**call["function"], "arguments": arguments}}
    return call


def plain_message(message: dict, text_arguments: bool) -> dict:
    """A message as the template is to see it."""
    shown = {k: v for k, v in message.items() if k not in HIDDEN and v is not None}
    if calls := shown.get("tool_calls"):
        shown["tool_calls"] = [as_call(call, text_arguments) for call in calls]
    return shown


def cuttings(messages: list[dict], tools: list | None, text_arguments: bool) -> Iterator[Cutting]:
    """The ways to cut a conversation, the likeliest first."""
    answers = [message for message in messages if message["role"] == "assistant"]
    contents = [answer.get("content") or "" for answer in answers]
    thinking, empty, leaves = ["none"], [True], [True]
    if any(END_THINK in content and THINKING["loose"].fullmatch(content) for content in contents):
        exact = any(THINKING["exact"].fullmatch(content) for content in contents)
        thinking = ["exact", "none", "loose"] if exact else ["none", "loose"]
    if not all(c.strip() or a.get("tool_calls") for c, a in zip(contents, answers, strict=True)):
        empty = [True, False]
    if tools or any(answer.get("tool_calls") for answer in answers):
        leaves = [True, False]
    for choices in itertools.product(thinking, empty, leaves):
        yield Cutting(*choices, text_arguments)


def parse_layout(text: str) -> Layout:
    """What a template made of stand-ins; its control tokens are not renamed yet.

    Raises:
        ValueError: the template takes texts apart.
    """
    found = list(SLOT.finditer(text))
    edges = [0, *(edge for match in found for edge in match.span()), len(text)]
    pieces = [text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    if any(NONCE in piece for piece in pieces):
        raise ValueError("the chat template does not write texts as they are")
    slots = [(int(match[1]), (len(match[2]) + 1).bit_length() - 1) for match in found]
    return Layout(pieces, [], slots)
