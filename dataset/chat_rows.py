"""Rows of the four chat formats (MiniMind, ShareGPT, Alpaca, OpenAI), checked and brought into one shape.

Pure functions. Every fault of a row is a ValueError with a short reason; the caller adds the file and the line.
"""

import json

# What a turn may call its speaker, and the four roles of the layout.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip

FORMATS = {
    "minimind": '{"conversations": [{"role", "content"}, ...]}',
    "sharegpt": '{"conversations": [{"from", "value"}, ...]}',
    "alpaca": '{"instruction", "input", "output"}',
    "openai": '{"messages": [{"role", "content"}, ...]}',
}


def detect_format(row) -> str:
    """Name the format of a row: 'minimind', 'sharegpt', 'alpaca' or 'openai'.

    Raises:
        ValueError: not an object, an empty conversation, or none of the four shapes.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {_kind(row)}")
    if "messages" in row:
        return "openai"
    if "conversations" in row:
        turns = _turns(row, "conversations")
        if isinstance(turns[0], dict) and "from" in turns[0]:
            return "sharegpt"
        return "minimind"
    if "instruction" in row or "output" in row:
        return "alpaca"
    raise _wrong_schema(row)


def normalise_row(row, fmt: str, need_assistant: bool = True) -> tuple[list[dict], list[dict] | None]:
    """Bring one row into the shape that `encode_chats` and `apply_chat_template` take.

    Args:
        row: a parsed JSON row.
        fmt: what `detect_format` said about the file.
        need_assistant: False for prompts, where nothing has been answered yet.

    Returns:
        messages: dicts with role (system, user, assistant, tool), content (str) and, on assistant turns that have them,
            reasoning_content (str) and tool_calls ([{"name", "arguments": dict}]).
        tools: list of function specs, or None.

    Raises:
        ValueError: a fault of the row, in one line, without the file and line, which the caller knows.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {_kind(row)}")
    key = {"openai": "messages", "alpaca": "output"}.get(fmt, "conversations")
    if key not in row or (fmt == "alpaca" and "instruction" not in row):
        raise _wrong_schema(row, fmt)
    if fmt == "alpaca":
        turns = _alpaca_turns(row)
    else:
        turns = _turns(row, key)
        if fmt == "sharegpt" and row.get("system"):
            turns = [{"from": "system", "value": row["system"]}, *turns]
    role_key, content_key = ("from", "value") if fmt == "sharegpt" else ("role", "content")
    messages = [_normalise_turn(turn, f"turn {n}", role_key, content_key) for n, turn in enumerate(turns, 1)]

    for n, message in enumerate(messages, 1):
        if message["role"] == "system" and n > 1:
            raise ValueError(f"turn {n}: a system turn must be the first turn")
    if need_assistant and all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn, so there is nothing to learn from")
    tools = row.get("tools")
    if not tools and messages[0]["role"] == "system":
        tools = turns[0].get("tools")  # MiniMind writes them on the system turn
    return messages, _tools(tools)


def _alpaca_turns(row: dict) -> list[dict]:
    """Turn instruction, input, output and the optional system and history into role/content turns."""
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    fields = {name: row[name] for name in ("instruction", "output")}
    fields["input"] = "" if row.get("input") is None else row["input"]
    for name, value in fields.items():
        _text(value, f"'{name}'")
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = fields["instruction"] + ("\n" + fields["input"] if fields["input"] else "")
    return turns + [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]


def _normalise_turn(turn, where: str, role_key: str, content_key: str) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object, found {_kind(turn)}")
    if role_key not in turn:
        raise ValueError(f"{where} has no {role_key!r} (keys found: {', '.join(map(str, turn)) or 'none'})")
    name = turn[role_key]
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"{where}: unknown role {repr(name)[:40]} (known: {', '.join(ROLES)})")
    role, content, calls, calls_key = ROLES[name], turn.get(content_key), turn.get("tool_calls"), "tool_calls"
    if name == "function_call":  # ShareGPT: the value is the call itself
        content, calls, calls_key = "", _text(content, f"{where}: {content_key!r}"), content_key
    if isinstance(content, list):  # OpenAI: a list of text parts
        content = "".join(_part(part, where) for part in content)
    if content is None and calls and role == "assistant":
        content = ""
    if content_key not in turn and content is None:
        raise ValueError(f"{where} has no {content_key!r} (keys found: {', '.join(map(str, turn))})")
    message = {"role": role, "content": _text(content, f"{where}: {content_key!r}")}
    for key in ("reasoning_content", "tool_calls"):
        if turn.get(key) and role != "assistant":
            raise ValueError(f"{where}: {key!r} belongs on an assistant turn, found on {name!r}")
    if turn.get("reasoning_content"):
        message["reasoning_content"] = _text(turn["reasoning_content"], f"{where}: 'reasoning_content'")
    if calls or name == "function_call":
        message["tool_calls"] = [_tool_call(call, where) for call in _json_list(calls, f"{where}: {calls_key!r}")]
    return message


def _part(part, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise ValueError(f"{where}: a content part must be text, found {json.dumps(part, default=str)[:60]}")
    return part


def _tool_call(call, where: str) -> dict:
    """Accept {"function": {"name", "arguments"}} and {"name", "arguments"}; arguments may be a JSON string."""
    call = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise ValueError(f"{where}: a tool call must be an object with a 'name' and 'arguments'")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", f"{where}: the arguments of {call['name']!r}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments of {call['name']!r} must be an object, found {_kind(arguments)}")
    call = {"name": call["name"], "arguments": arguments}
    _text(dump_json(call), f"{where}: the call of {call['name']!r}")
    return call


def _tools(value) -> list[dict] | None:
    tools = _json_list(value, "'tools'") if value else []
    if any(not isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' must be a list of function objects")
    _text(dump_json(tools), "'tools'")
    return tools or None


def _json_list(value, where: str) -> list:
    value = _parse_json(value, where) if isinstance(value, str) else value
    if isinstance(value, dict):
        value = [value]
    if value is None:
        value = []
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, found {_kind(value)}")
    return value


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None


def dump_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value, where: str) -> str:
    """Return value if it is a string that UTF-8 can hold. JSON can spell half a surrogate pair, and that cannot."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, found {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"{where} has a lone surrogate {bad} at character {error.start}") from None
    return value


def _turns(row: dict, key: str) -> list:
    if not isinstance(row[key], list):
        raise ValueError(f"{key!r} must be a list of turns, found {_kind(row[key])}")
    if not row[key]:
        raise ValueError(f"empty conversation ({key!r} has no turns)")
    return row[key]


def _kind(value) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _wrong_schema(row: dict, fmt: str | None = None) -> ValueError:
    found = ", ".join(map(repr, list(row)[:10])) or "none"
    if fmt:
        return ValueError(f"not a row of the {fmt} format like the first, {FORMATS[fmt]}; keys found: {found}")
    return ValueError(f"unknown schema, keys found: {found}; accepted: {'; '.join(FORMATS.values())}")
