"""Rows of the four chat formats (MiniMind, ShareGPT, Alpaca, OpenAI), checked, in one shape.

Every fault of a row is a ValueError with a short reason; the caller adds the file and the line.
Turn numbers in it count the turns that the file has. A field with null is a field that is not
there. The fields in `plain_rows.SPECIAL` change what is learned, of a row or of a turn:
`turn_fields.py` obeys or refuses each by name. Any other (id, source, score, lang, ...) is a note.
"""

from dataset.checks import check_text, json_type, present
from dataset.plain_rows import SPECIAL

# What a turn may call its speaker, and the four roles of the layout.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip


def detect_format(row: object) -> str:
    """Name the format of a row: 'minimind', 'sharegpt', 'alpaca' or 'openai'.

    Raises:
        ValueError: not an object, an empty conversation, or none of the four shapes.
    """
    row = present(check_row(row))
    if "messages" in row:
        return "openai"
    if "conversations" in row:
        turns = check_turns(row["conversations"], "conversations")
        return "sharegpt" if is_sharegpt(turns[:1]) else "minimind"
    if "instruction" in row or "output" in row:
        return "alpaca"
    from dataset.row_faults import wrong_schema

    raise wrong_schema(row)


def is_sharegpt(turns: list) -> bool:
    """Whether turns, or some of them, have from and value."""
    return any(isinstance(turn, dict) and turn.get("from") is not None for turn in turns)


def normalise_row(
    row: object, fmt: str, need_assistant: bool = True
) -> tuple[list[dict], list[dict] | None]:
    """Bring one row into the shape that `ChatCoder` and `apply_chat_template` take.

    Args:
        row: a parsed JSON row.
        fmt: what `detect_format` said about the file.
        need_assistant: False for prompts, where nothing has been answered yet.

    Returns:
        messages: dicts with role (system, user, assistant, tool), content (str) and, on assistant
            turns that have them, reasoning_content (str), tool_calls ([{"name", "arguments"}], each
            with its id, if any) and loss (False: not to learn from); on tool turns that have them,
            name and tool_call_id.
        tools: list of function specs, or None.

    Raises:
        ValueError: a fault of the row, in one line, without the file and line.
    """
    row = present(check_row(row))
    key = {"openai": "messages", "alpaca": "output"}.get(fmt, "conversations")
    if key not in row or (fmt == "alpaca" and "instruction" not in row):
        from dataset.row_faults import wrong_schema

        raise wrong_schema(row, fmt)
    if fmt == "alpaca":
        from dataset.alpaca import normalise_alpaca

        messages, row = normalise_alpaca(row, need_assistant)
    else:
        messages = normalise_turns(check_turns(row[key], key), fmt == "sharegpt")
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
    if SPECIAL.isdisjoint(row) and "tools" not in messages[0]:
        return messages, None
    from dataset import turn_fields

    return turn_fields.add_row_fields(messages, row, is_prompt)


def normalise_turns(turns: list, sharegpt: bool) -> list[dict]:
    """Turns as messages of `normalise_row`; a system turn has its own tools, too."""
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    messages = []
    for n, turn in enumerate(turns, 1):
        where = f"turn {n}"
        fields = present(turn) if isinstance(turn, dict) else {}
        name, content = fields.get(role_key), fields.get(content_key)
        if not isinstance(name, str) or name not in ROLES:
            from dataset.turn_fields import wrong_turn

            raise wrong_turn(turn, where, role_key, ROLES)
        if isinstance(content, str) and SPECIAL.isdisjoint(fields) and name != "function_call":
            text = check_text(content, f"{where}: {content_key!r}")
            messages.append({"role": ROLES[name], "content": text})
        else:
            from dataset.turn_fields import normalise_special_turn as normalise

            messages.append(normalise(turn, ROLES[name], where, role_key, content_key))
        if n > 1 and messages[-1]["role"] == "system":
            raise ValueError(f"{where}: a system turn must be the first turn")
    return messages


def check_row(row: object) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {json_type(row)}")
    return row


def check_turns(turns: object, key: str) -> list:
    if not isinstance(turns, list):
        raise ValueError(f"{key!r} must be a list of turns, found {json_type(turns)}")
    if not turns:
        raise ValueError(f"empty conversation ({key!r} has no turns)")
    return turns
