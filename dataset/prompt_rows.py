"""Rows that are prompts, in whatever form: what is asked, and what is wrong with it.

`prompt_dataset.py` reads plain ones itself: turns of roles and texts that end with the user's.
"""

from typing import Any

from dataset.chat_format import ChatCoder
from dataset.chat_rows import normalise_row
from dataset.reference_answer import reference_answer

# Fields of a row that are the prompt.
TALK = ("conversations", "messages", "instruction", "input", "output", "history", "system")


def split_prompt(
    row: Any, fmt: str, coder: ChatCoder
) -> tuple[list[dict], list[dict] | None, dict]:
    """A row as (messages of the prompt, tools, the row with its "answer" where there is one).

    Raises:
        ValueError: a fault of the row, without file and line.
    """
    if isinstance(row, dict):
        row = {
            name: value
            for name, value in row.items()
            if value is not None or name not in (*TALK, "answer")
        }
        if fmt == "alpaca" and "instruction" in row:
            row = {"output": ""} | row  # a prompt needs none
    messages, tools = normalise_row(row, fmt, need_assistant=False)
    if messages[-1]["role"] == "assistant":
        answer = reference_answer(coder, messages, tools)
        messages.pop()
        row = ({"answer": answer} if answer else {}) | row
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no user turn, so there is nothing to answer")
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"the prompt must end with the user's turn, it ends with the {messages[-1]['role']}'s"
        )
    if not isinstance(row.get("answer", ""), str):
        raise ValueError("'answer' must be a string")
    return messages, tools, row
