"""Answers in the form of OpenAI's API: whole, and as chunks of a stream of server-sent events.

What the chunks of a request have in common is written once; each is then three pieces joined.
"""

import itertools
import json

from runtime.serving.replies import Replies, Reply, dump
from runtime.serving.reply_parts import Part

DONE = b"data: [DONE]\n\n"
# Of a reply that the server ended before its time, too.
FINISH_REASONS = {"cancelled": "length", "refused": "length", "error": "length"}


def finish_reason(choice: Reply) -> str:
    reason = choice.finish_reason or "cancelled"
    return FINISH_REASONS.get(reason, reason)


def whole_answer(replies: Replies, parts: list[list[Part]]) -> bytes:
    """The answer to a request that does not stream.

    Args:
        parts: of each choice.
    """
    is_chat = replies.wanted.is_chat
    choices = []
    for number, (choice, own) in enumerate(zip(replies.choices, parts, strict=True)):
        said = {"message": message(own)} if is_chat else {"text": text_of(own, "content")}
        choices.append(
            {"index": number}
            | said
            | {"logprobs": choice.take_logprobs(), "finish_reason": finish_reason(choice)}
        )
    answer = {
        "id": replies.id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": replies.created,
        "model": replies.model.name,
        "choices": choices,
        "usage": replies.usage(),
    }
    return dump(answer).encode()


def text_of(parts: list[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def message(parts: list[Part]) -> dict:
    """What the assistant says, in the form of a message."""
    content, thought = text_of(parts, "content"), text_of(parts, "reasoning_content")
    calls: dict[int, dict] = {}
    for part in parts:
        if part.kind == "tool_call":
            if part.name:
                calls[part.index] = call_start(part) | {"type": "function"}
                del calls[part.index]["index"]
            else:
                calls[part.index]["function"]["arguments"] += part.text
    said = {"role": "assistant", "content": content or (None if calls else "")}
    said |= {"reasoning_content": thought} if thought else {}
    said |= {"tool_calls": list(calls.values())} if calls else {}
    return said | {"refusal": None}


def call_start(part: Part) -> dict:
    function = {"name": part.name, "arguments": part.text}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}


class Chunks:
    """The chunks of a request that streams, as bytes."""

    def __init__(self, replies: Replies):
        self.replies, self.is_chat = replies, replies.wanted.is_chat
        head = {
            "id": replies.id,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "created": replies.created,
            "model": replies.model.name,
        }
        self.head = "data: " + dump(head)[:-1] + ',"choices":['
        self.tail = "]}\n\n"
        if replies.wanted.include_usage:  # then every chunk has it, and all but the last null
            self.tail = '],"usage":null}\n\n'
        self.greeted: set[int] = set()

    def news(self, number: int, parts: list[Part]) -> str:
        """What is new of a choice, its end included."""
        choice = self.replies.choices[number]
        said = [self._delta(list(own)) for _, own in itertools.groupby(parts, key=_key)]
        reason = None if choice.finish_reason is None else f'"{finish_reason(choice)}"'
        if not said and not reason and not choice.logprobs:
            return ""
        is_first = self.is_chat and number not in self.greeted
        if not said and (is_first or not reason):
            said = ['"content":""' if self.is_chat else '"text":""']
        if is_first:
            self.greeted.add(number)
            said[0] = f'"role":"assistant",{said[0]}'
        chunks = [self._chunk(number, delta, choice, "null") for delta in said]
        if reason:
            end = "" if self.is_chat else '"text":""'
            chunks.append(self._chunk(number, end, choice, reason))
        return "".join(chunks)

    def _delta(self, parts: list[Part]) -> str:
        """Parts of one kind as fields of a delta, or of a choice of /v1/completions."""
        kind, text = parts[0].kind, "".join(part.text for part in parts)
        if kind != "tool_call":
            name = kind if self.is_chat else "text"
            return f'"{name}":{json.dumps(text, ensure_ascii=False)}'
        first = parts[0]
        piece = {"index": first.index, "function": {"arguments": text}}
        if first.name:
            piece = call_start(first._replace(text=text))
        return f'"tool_calls":{dump([piece])}'

    def _chunk(self, number: int, delta: str, choice: Reply, ending: str) -> str:
        said = f'"delta":{{{delta}}}' if self.is_chat else delta
        logprobs = "null"
        if choice.include_logprobs and choice.logprobs:
            logprobs = dump(choice.take_logprobs())
        choice_text = f'{{"index":{number},{said},"logprobs":{logprobs},"finish_reason":{ending}}}'
        return self.head + choice_text + self.tail

    def last(self) -> bytes:
        """What stands behind the chunks of all choices."""
        if not self.replies.wanted.include_usage:
            return DONE
        usage = dump(self.replies.usage())
        return f'{self.head}],"usage":{usage}}}\n\n'.encode() + DONE


def _key(part: Part) -> tuple:
    return part.kind, part.index
