"""Rows of the Alpaca format: instruction, input, output and an optional history."""

from dataset.checks import check_text
from dataset.row_fields import THINKING
from dataset.turn_fields import thinking_of


def normalise_alpaca(row: dict, need_assistant: bool) -> tuple[list[dict], dict]:
    """The messages of a row, and the row; its thinking belongs to the answer where there is one."""
    messages = alpaca_turns(row)
    if need_assistant:
        messages[-1] |= thinking_of(row, "")
        row = {name: value for name, value in row.items() if name not in THINKING}
    return messages, row


def alpaca_turns(row: dict) -> list[dict]:
    """Turn instruction, input, output and the optional history into turns."""
    history = row.get("history", [])
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 for pair in history
    ):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    question, more, answer = (
        check_text(row.get(name, ""), f"{name!r}") for name in ("instruction", "input", "output")
    )
    turns = []
    for n, pair in enumerate(history, 1):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = check_text(text, f"'history', pair {n}: its {role} text")
            turns.append({"role": role, "content": content})
    question += "\n" + more if more else ""
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
