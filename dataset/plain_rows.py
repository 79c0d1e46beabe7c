"""Rows that hold a conversation of roles and texts, as nearly all do.

    {"conversations": [{"role": "user", "content": ...}, ...]}    MiniMind
    {"messages": [{"role": "user", "content": ...}, ...]}         OpenAI

Other formats, other names of roles, and every fault of a row are for `chat_rows.py`.
"""

KEYS = {"minimind": "conversations", "openai": "messages"}
ROLES = ("system", "user", "assistant", "tool")
TURN = {"role", "content"}

# Fields of a row or a turn that change what is learned. Any other (id, source, score, lang, ...) is
# a note.
SPECIAL = frozenset(
    "system system_prompt system_message tools functions tool_choice tool_calls function_call"
    " reasoning_content reasoning thinking weight train loss mask loss_mask loss_weight"
    " train_detail image images video videos audio audios kto_tag label name refusal"
    " tool_call_id".split()
)


def plain_format(row: object, need_assistant: bool = True) -> str | None:
    """What `chat_rows.detect_format` says of a row, if it is plain; else None."""
    has_messages = isinstance(row, dict) and row.get("messages") is not None
    fmt = "openai" if has_messages else "minimind"
    return fmt if plain_messages(row, fmt, need_assistant) else None


def plain_messages(row: object, fmt: str | None, need_assistant: bool = True) -> list[dict] | None:
    """The turns of a row, if it is plain: what `chat_rows.normalise_row` makes of it.

    Args:
        row: of a file, parsed; `read_rows` has found no lone surrogate in it.
        fmt: of the file; of another one than these two no row is plain.
        need_assistant: False for prompts, where nothing has been answered yet.
    """
    if not isinstance(row, dict) or not SPECIAL.isdisjoint(row):
        return None
    turns = row.get(KEYS.get(fmt))
    if not are_plain(turns):
        return None
    is_answered = any(turn["role"] == "assistant" for turn in turns)
    return turns if is_answered or not need_assistant else None


def are_plain(turns: object) -> bool:
    """Whether they are turns of roles and texts, a system turn only as the first."""
    if not isinstance(turns, list) or not turns:
        return False
    for n, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.keys() != TURN:
            return False
        role = turn["role"]
        if role not in ROLES or not isinstance(turn["content"], str) or (n and role == "system"):
            return False
    return True
