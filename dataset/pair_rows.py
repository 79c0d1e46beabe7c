"""Preference pairs in whatever form: a row -> its two conversations, or what is wrong with it.

The forms stand in `preference_dataset.py`, which reads plain pairs itself: texts, or whole
conversations of plain turns. Here are all others, with a prompt in turns, with tools, with fields
that say what is learned, and every fault of a row.
"""

from dataset.chat_rows import add_row_fields, is_sharegpt, normalise_turns
from dataset.checks import present
from dataset.row_fields import refuse

SIDES = ("chosen", "rejected")
SHAPES = '{"chosen": [turns], "rejected": [turns]} or {"prompt", "chosen", "rejected"}'


def normalise_pair(row: object) -> list[tuple[list[dict], list[dict] | None]]:
    """Bring a row into two conversations, chosen and rejected, as `ChatCoder` takes them.

    They are alike up to the last turn, which is the assistant's.

    Raises:
        ValueError: a fault of the row, in one line, without the file and line.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object {SHAPES}, found {type(row).__name__}")
    row = present(row)
    for side in SIDES:
        if side not in row:
            found = ", ".join(map(repr, list(row)[:10])) or "none"
            raise ValueError(
                f"a preference pair needs {side!r}; keys found: {found}; accepted: {SHAPES}"
            )
    refuse(row, {"margin": "pairs are learned without one, take the field out"})
    prompt = turns_of(row.get("prompt") or row.get("conversations") or [], "user", "prompt")
    chats = [normalise_side(row, prompt, side) for side in SIDES]
    (chosen, _), (rejected, _) = chats
    if chosen[-1] == rejected[-1] and chosen[:-1] == rejected[:-1]:
        raise ValueError("chosen and rejected are the same answer: there is nothing to prefer")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            "chosen and rejected answer different prompts: they may differ in their last turn only"
        )
    if len(chosen) == 1:
        raise ValueError(f"there is no prompt before the answers; accepted: {SHAPES}")
    return chats


def normalise_side(row: dict, prompt: list[dict], side: str) -> tuple[list[dict], list | None]:
    """The conversation that ends with the answer of a side, and its tools."""
    answer = turns_of(row[side], "assistant", side)
    if answer and answer[0]["role"] in ("system", "user"):
        answer = with_prompt(answer, prompt, side)
    else:
        answer = [*prompt, *answer]
    if not answer:
        raise ValueError(f"{side}: empty conversation")
    messages, tools = add_row_fields(answer, row)
    last = messages[-1]
    if last["role"] != "assistant":
        fault = f"the last turn must be the assistant's answer, it is of role {last['role']}"
        raise ValueError(f"{side}: {fault}")
    if not (last["content"].strip() or last.get("reasoning_content") or last.get("tool_calls")):
        raise ValueError(f"{side}: the answer is empty")
    return messages, tools


def turns_of(part: object, role: str, name: str) -> list[dict]:
    """A text, a turn or a list of turns as messages; a text is of the role."""
    turns = part if isinstance(part, list) else [part]
    sharegpt = is_sharegpt(turns)
    by, text = ("from", "value") if sharegpt else ("role", "content")
    try:
        return normalise_turns(
            [{by: role, text: turn} if isinstance(turn, str) else turn for turn in turns], sharegpt
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def with_prompt(whole: list[dict], prompt: list[dict], side: str) -> list[dict]:
    """A side that is the whole conversation and repeats the prompt, perhaps not its system turn.

    Raises:
        ValueError: it does not repeat it.
    """
    size = len(prompt)
    if any(whole[at : at + size] == prompt for at in range(len(whole) - size + 1)):
        return whole
    if prompt[0]["role"] == "system" and whole[: size - 1] == prompt[1:]:
        return [prompt[0], *whole]
    raise ValueError(
        f"{side}: it begins with a {whole[0]['role']} turn, so it is the whole conversation, but it"
        " does not repeat the prompt: take the prompt out of the row, or all but the answer out of"
        " this field"
    )
