"""Rows of the four chat formats (MiniMind, ShareGPT, Alpaca, OpenAI), checked and brought into one
shape.

Pure functions. Every fault of a row is a ValueError with a short reason; the caller adds the file
and the line. Turn numbers in it count the turns that the file has.

A field with null is a field that is not there. A field that changes what is learned, of a row or of
a turn, is obeyed or refused by name: all that are known to do so are listed below. Any other (id,
source, score, lang, ...) is a note.

    obeyed   system, tools, functions; of a turn: role, content, reasoning_content (reasoning,
             thinking), tool_calls, function_call; of both: weight, train, loss, where 0 or false
             means to read a turn but not to learn it
    refused  `REFUSED`, and on rows or turns alone `REFUSED_ON_ROWS` and `REFUSED_ON_TURNS`

In prompts (RL, scoring) nothing is learned from the row's own turns, and its fields are there for
the rewards: only `REFUSED_ON_PROMPTS` are refused.
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

NOTHING = (None, "", [], {})
LEARN = ("weight", "train", "loss")
THINKING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
TOOLS = ("tools", "functions")

# name -> what to do about it
MEDIA = dict.fromkeys(
    ("image", "images", "video", "videos", "audio", "audios"),
    "the model reads text only: take such rows out",
)
REFUSED = MEDIA | dict.fromkeys(
    ("mask", "loss_mask", "loss_weight", "train_detail"),
    "say what is learned with 'weight': 0 or 1 on a turn",
)
REFUSED_ON_PROMPTS = MEDIA | dict.fromkeys(
    ("system_prompt", "system_message"), "rename it to 'system'"
)
REFUSED_ON_ROWS = (
    REFUSED
    | REFUSED_ON_PROMPTS
    | dict.fromkeys(THINKING, "it belongs on an assistant turn")
    | dict.fromkeys(
        ("kto_tag", "label"),
        "no stage learns from single judgements: make pairs, or take the field out",
    )
)
REFUSED_ON_TOOL_TURNS = REFUSED | {"refusal": "put it into the content"}
REFUSED_ON_TURNS = REFUSED_ON_TOOL_TURNS | {
    "name": "the chat layout has none: put it into the content, or take the field out"
}


def present(fields: dict) -> dict:
    """The fields that are there: one with null is not."""
    return {name: value for name, value in fields.items() if value is not None}


def detect_format(row) -> str:
    """Name the format of a row: 'minimind', 'sharegpt', 'alpaca' or 'openai'.

    Raises:
        ValueError: not an object, an empty conversation, or none of the four shapes.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {_kind(row)}")
    row = present(row)
    if "messages" in row:
        return "openai"
    if "conversations" in row:
        return "sharegpt" if is_sharegpt(_turns(row, "conversations")[:1]) else "minimind"
    if "instruction" in row or "output" in row:
        return "alpaca"
    raise _wrong_schema(row)


def is_sharegpt(turns: list) -> bool:
    """Whether turns, or some of them, have from and value."""
    return any(isinstance(turn, dict) and turn.get("from") is not None for turn in turns)


def normalise_row(
    row, fmt: str, need_assistant: bool = True
) -> tuple[list[dict], list[dict] | None]:
    """Bring one row into the shape that `encode_chats` and `apply_chat_template` take.

    Args:
        row: a parsed JSON row.
        fmt: what `detect_format` said about the file.
        need_assistant: False for prompts, where nothing has been answered yet.

    Returns:
        messages: dicts with role (system, user, assistant, tool), content (str) and, on assistant
        turns that have them,
            reasoning_content (str), tool_calls ([{"name", "arguments": dict}]) and loss (False: not
            to learn from).
        tools: list of function specs, or None.

    Raises:
        ValueError: a fault of the row, in one line, without the file and line, which the caller
        knows.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {_kind(row)}")
    row = present(row)
    key = {"openai": "messages", "alpaca": "output"}.get(fmt, "conversations")
    if key not in row or (fmt == "alpaca" and "instruction" not in row):
        raise _wrong_schema(row, fmt)
    if fmt == "alpaca":
        messages = _alpaca_turns(row)
        if need_assistant:
            messages[-1] |= _thinking(row, "")
            row = {name: value for name, value in row.items() if name not in THINKING}
    else:
        messages = normalise_turns(_turns(row, key), fmt == "sharegpt")
    if need_assistant and all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn, so there is nothing to learn from")
    return add_row_fields(messages, row, is_prompt=not need_assistant)


def add_row_fields(
    messages: list[dict], row: dict, is_prompt: bool = False
) -> tuple[list[dict], list[dict] | None]:
    """What the row itself says about a conversation: (messages with its system text, tools).

    Args:
        messages: as `normalise_turns` gives them.
        row: without null.
        is_prompt: nothing is learned from these turns, and the fields of a row are for its rewards.
    """
    refuse(row, REFUSED_ON_PROMPTS if is_prompt else REFUSED_ON_ROWS)
    for name in ("tool_choice", *CALLS):
        if row.get(name) not in (*NOTHING, "auto"):
            raise ValueError(f'{name!r} of a row must be "auto": take the field out')
    learned = learns(row)
    if is_prompt and not learned:
        raise ValueError("the row is not to be learned from (weight, train or loss): take it out")
    if not learned:
        messages = [
            {**message, "loss": False} if message["role"] == "assistant" else message
            for message in messages
        ]
    own = [message["content"] for message in messages[:1] if message["role"] == "system"]
    system = _text(row.get("system", ""), "'system'")
    if system and own and system != own[0]:
        raise ValueError("'system' and the system turn differ: keep one of them")
    tools = [found for name in TOOLS if (found := _tools(row.get(name), f"{name!r}"))]
    if own:
        first = dict(messages[0])
        tools += (
            [first.pop("tools")] if "tools" in first else []
        )  # MiniMind writes them on the system turn
        messages = [first, *messages[1:]]
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    if any(found != tools[0] for found in tools):
        raise ValueError("'tools' or 'functions' are there twice and differ: keep one of them")
    return messages, tools[0] if tools else None


def refuse(fields: dict, names: dict[str, str], where: str = "") -> None:
    """Raise a ValueError where a field is there that would change what is learned and is not
    supported."""
    for name in names.keys() & fields.keys():
        if fields[name] not in NOTHING:
            if name != "label" or isinstance(fields[name], bool):  # any other label is a note
                raise ValueError(f"{where}{name!r} is not supported: {names[name]}")


def learns(fields: dict, where: str = "") -> bool:
    """Whether a row or a turn is to be learned from: what weight, train and loss say, 0 or 1 (false
    or true)."""
    said = {name: fields[name] for name in LEARN if name in fields}
    for name, value in said.items():
        if value not in (0, 1):
            found = json.dumps(value, default=str)[:40]
            raise ValueError(f"{where}{name!r} must be 0 or 1 (false or true), found {found}")
    return all(said.values())


def _alpaca_turns(row: dict) -> list[dict]:
    """Turn instruction, input, output and the optional history into turns."""
    history = row.get("history", [])
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    question, more, answer = (
        _text(row.get(name, ""), f"{name!r}") for name in ("instruction", "input", "output")
    )
    turns = []
    for n, pair in enumerate(history, 1):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(
                {"role": role, "content": _text(text, f"'history', pair {n}: its {role} text")}
            )
    question += "\n" + more if more else ""
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def normalise_turns(turns: list, sharegpt: bool) -> list[dict]:
    """Turns as messages of `normalise_row`; a system turn has its own tools, too."""
    messages = []
    for n, turn in enumerate(turns, 1):
        messages.append(
            _normalise_turn(
                turn, f"turn {n}", *(("from", "value") if sharegpt else ("role", "content"))
            )
        )
        if n > 1 and messages[-1]["role"] == "system":
            raise ValueError(f"turn {n}: a system turn must be the first turn")
    return messages


def _normalise_turn(turn, where: str, role_key: str, content_key: str) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object, found {_kind(turn)}")
    given, turn = turn, present(turn)
    if role_key not in turn:
        raise ValueError(
            f"{where} has no {role_key!r} (keys found: {', '.join(map(str, turn)) or 'none'})"
        )
    name = turn[role_key]
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"{where}: unknown role {repr(name)[:40]} (known: {', '.join(ROLES)})")
    content, at = turn.get(content_key), f"{where}: "
    calls = {key: turn[key] for key in CALLS if turn.get(key)}
    if name == "function_call":  # ShareGPT: the value is the call itself
        calls[content_key] = _text(content, f"{at}{content_key!r}")
        content = ""
    if isinstance(content, list):  # OpenAI: a list of text parts
        content = "".join(_part(part, at) for part in content)
    if content is None and calls and ROLES[name] == "assistant":
        content = ""
    if content is None and content_key not in given:
        raise ValueError(
            f"{where} has no {content_key!r} (keys found: {', '.join(map(str, turn))})"
        )
    message = {"role": ROLES[name], "content": _text(content, f"{at}{content_key!r}")}
    if len(turn) > 2 or calls:
        _add_turn_fields(message, turn, name, calls, at)
    return message


def _add_turn_fields(message: dict, turn: dict, name: str, calls: dict, at: str) -> None:
    """Obey or refuse what a turn says beside its role and content."""
    role = message["role"]
    refuse(turn, REFUSED_ON_TOOL_TURNS if role == "tool" else REFUSED_ON_TURNS, at)
    for key in (*THINKING, *CALLS):
        if turn.get(key) and role != "assistant":
            raise ValueError(f"{at}{key!r} belongs on an assistant turn, found on {name!r}")
    message |= _thinking(turn, at)
    if len(calls) > 1:
        raise ValueError(f"{at}{' and '.join(map(repr, calls))} are both calls: keep one of them")
    for key, value in calls.items():
        message["tool_calls"] = [_tool_call(call, at) for call in _json_list(value, f"{at}{key!r}")]
    for key in TOOLS:
        if tools := _tools(turn.get(key), f"{at}{key!r}"):
            if role != "system" or message.get("tools", tools) != tools:
                raise ValueError(f"{at}{key!r} belongs on the row or on the system turn, and once")
            message["tools"] = tools
    learned = learns(turn, at)
    if role == "assistant":
        if not learned:
            message["loss"] = False
    elif asked := [key for key in LEARN if turn.get(key)]:
        raise ValueError(
            f"{at}{asked[0]!r} asks to learn from {name!r}, only assistant turns are learned from"
        )


def _thinking(fields: dict, where: str) -> dict:
    """{"reasoning_content": text} under whichever name it is there, or {}."""
    texts = {name: _text(fields[name], f"{where}{name!r}") for name in THINKING if fields.get(name)}
    if len(set(texts.values())) > 1:
        raise ValueError(f"{where}{' and '.join(map(repr, texts))} differ: keep one of them")
    return {"reasoning_content": next(iter(texts.values()))} if texts else {}


def _part(part, where: str) -> str:
    if isinstance(part, dict) and present(part).get("type", "text") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise ValueError(
            f"{where}a content part must be text, found {json.dumps(part, default=str)[:60]}"
        )
    return part


def _tool_call(call, where: str) -> dict:
    """Accept {"function": {"name", "arguments"}} and {"name", "arguments"}; arguments may be a JSON
    string."""
    call = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise ValueError(f"{where}a tool call must be an object with a 'name' and 'arguments'")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", f"{where}the arguments of {call['name']!r}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}the arguments of {call['name']!r} must be an object, found {_kind(arguments)}"
        )
    call = {"name": call["name"], "arguments": arguments}
    _text(dump_json(call), f"{where}the call of {call['name']!r}")
    return call


def _tools(value, where: str) -> list[dict]:
    if not value:
        return []
    tools = _json_list(value, where)
    if any(not isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where} must be a list of function objects")
    _text(dump_json(tools), where)
    return tools


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
    """Return value if it is a string that UTF-8 can hold. JSON can spell half a surrogate pair, and
    that cannot."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, found {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            bad = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(
                f"{where} has a lone surrogate {bad} at character {error.start}"
            ) from None
    return value


def _turns(row: dict, key: str) -> list:
    if not isinstance(row[key], list):
        raise ValueError(f"{key!r} must be a list of turns, found {_kind(row[key])}")
    if not row[key]:
        raise ValueError(f"empty conversation ({key!r} has no turns)")
    return row[key]


def _kind(value) -> str:
    """The JSON name of a value's type, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _wrong_schema(row: dict, fmt: str | None = None) -> ValueError:
    found = ", ".join(map(repr, list(row)[:10])) or "none"
    if fmt:
        return ValueError(
            f"not a row of the {fmt} format like the first, {FORMATS[fmt]}; keys found: {found}"
        )
    return ValueError(
        f"unknown schema, keys found: {found}; accepted: {'; '.join(FORMATS.values())}"
    )
