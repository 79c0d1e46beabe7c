"""Turns and rows with more than roles and texts: system text, thinking, tools, what to learn."""

import json
from collections.abc import Iterable

from dataset.checks import check_text, json_type, present
from dataset.row_fields import (
    EMPTY,
    LEARN,
    REFUSED_ON_PROMPTS,
    REFUSED_ON_ROWS,
    REFUSED_ON_TOOL_TURNS,
    REFUSED_ON_TURNS,
    THINKING,
    learns,
    refuse,
)
from dataset.tools import normalise_tool_calls, parse_tools

CALLS = ("tool_calls", "function_call")
TOOLS = ("tools", "functions")


def add_row_fields(
    messages: list[dict], row: dict, is_prompt: bool
) -> tuple[list[dict], list[dict] | None]:
    """See `chat_rows.add_row_fields`."""
    refuse(row, REFUSED_ON_PROMPTS if is_prompt else REFUSED_ON_ROWS)
    for name in ("tool_choice", *CALLS):
        if row.get(name) not in (*EMPTY, "auto"):
            raise ValueError(f'{name!r} of a row must be "auto": take the field out')
    if not learns(row):
        if is_prompt:
            advice = "(weight, train or loss): take it out"
            raise ValueError(f"the row is not to be learned from {advice}")
        messages = [
            {**message, "loss": False} if message["role"] == "assistant" else message
            for message in messages
        ]
    own = [message["content"] for message in messages[:1] if message["role"] == "system"]
    system = check_text(row.get("system", ""), "'system'")
    if system and own and system != own[0]:
        raise ValueError("'system' and the system turn differ: keep one of them")
    tools = [value for name in TOOLS if (value := parse_tools(row.get(name), f"{name!r}"))]
    if own:
        first = dict(messages[0])
        if "tools" in first:  # MiniMind writes them on the system turn
            tools.append(first.pop("tools"))
        messages = [first, *messages[1:]]
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    if any(value != tools[0] for value in tools):
        raise ValueError("'tools' or 'functions' are there twice and differ: keep one of them")
    return messages, tools[0] if tools else None


def normalise_special_turn(
    turn: dict, role: str, where: str, role_key: str, content_key: str
) -> dict:
    """A turn as a message of the role, with whatever fields it has."""
    fields = present(turn)
    name = fields[role_key]
    content, at = fields.get(content_key), f"{where}: "
    calls = {key: fields[key] for key in CALLS if fields.get(key)}
    if name == "function_call":  # ShareGPT: the value is the call itself
        calls[content_key] = check_text(content, f"{at}{content_key!r}")
        content = ""
    if isinstance(content, list):  # OpenAI: a list of text parts
        content = "".join(_text_part(part, at) for part in content)
    if content is None and calls and role == "assistant":
        content = ""
    if content is None and content_key not in turn:
        keys = ", ".join(map(str, fields))
        raise ValueError(f"{where} has no {content_key!r} (keys found: {keys})")
    message = {"role": role, "content": check_text(content, f"{at}{content_key!r}")}
    if len(fields) > 2 or calls:
        _add_turn_fields(message, fields, name, calls, at)
    return message


def _text_part(part: object, where: str) -> str:
    if isinstance(part, dict) and present(part).get("type", "text") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        found = json.dumps(part, default=str)[:60]
        raise ValueError(f"{where}a content part must be text, found {found}")
    return part


def _add_turn_fields(message: dict, fields: dict, name: str, calls: dict, at: str) -> None:
    """Obey or refuse what a turn says beside its role and content."""
    role = message["role"]
    refuse(fields, REFUSED_ON_TOOL_TURNS if role == "tool" else REFUSED_ON_TURNS, at)
    for key in (*THINKING, *CALLS):
        if fields.get(key) and role != "assistant":
            raise ValueError(f"{at}{key!r} belongs on an assistant turn, found on {name!r}")
    message |= thinking_of(fields, at)
    if role == "tool":  # some chat templates show them
        known = {key: fields[key] for key in ("name", "tool_call_id") if fields.get(key)}
        message |= {key: check_text(value, f"{at}{key!r}") for key, value in known.items()}
    if len(calls) > 1:
        raise ValueError(f"{at}{' and '.join(map(repr, calls))} are both calls: keep one of them")
    for key, value in calls.items():
        message["tool_calls"] = normalise_tool_calls(value, key, at)
    for key in TOOLS:
        if tools := parse_tools(fields.get(key), f"{at}{key!r}"):
            if role != "system" or message.get("tools", tools) != tools:
                raise ValueError(f"{at}{key!r} belongs on the row or on the system turn, and once")
            message["tools"] = tools
    learned = learns(fields, at)
    if role == "assistant":
        if not learned:
            message["loss"] = False
    elif asked := [key for key in LEARN if fields.get(key)]:
        fault = f"asks to learn from {name!r}, only assistant turns are learned from"
        raise ValueError(f"{at}{asked[0]!r} {fault}")


def thinking_of(fields: dict, where: str) -> dict:
    """{"reasoning_content": text} under whichever name it is there, or {}."""
    texts = {
        name: check_text(fields[name], f"{where}{name!r}") for name in THINKING if fields.get(name)
    }
    if len(set(texts.values())) > 1:
        raise ValueError(f"{where}{' and '.join(map(repr, texts))} differ: keep one of them")
    return {"reasoning_content": next(iter(texts.values()))} if texts else {}


def wrong_turn(turn: object, where: str, role_key: str, roles: Iterable[str]) -> ValueError:
    """A turn is no object, or says its role in none of the ways that are known."""
    if not isinstance(turn, dict):
        return ValueError(f"{where} must be an object, found {json_type(turn)}")
    fields = present(turn)
    if role_key not in fields:
        keys = ", ".join(map(str, fields)) or "none"
        return ValueError(f"{where} has no {role_key!r} (keys found: {keys})")
    found = repr(fields[role_key])[:40]
    return ValueError(f"{where}: unknown role {found} (known: {', '.join(roles)})")
