"""Fields of a row or a turn that change what is learned: obeyed, or refused by name.

    obeyed   system, tools, functions; of a turn: role, content, reasoning_content (reasoning,
             thinking), tool_calls, function_call; of both: weight, train, loss, where 0 or false
             means to read a turn but not to learn it
    refused  `REFUSED`, and on rows or turns alone `REFUSED_ON_ROWS` and `REFUSED_ON_TURNS`

In prompts (RL, scoring) nothing is learned from the row's own turns, and its fields are there for
the rewards: only `REFUSED_ON_PROMPTS` are refused.
"""

import json

EMPTY = (None, "", [], {})
LEARN = ("weight", "train", "loss")
THINKING = ("reasoning_content", "reasoning", "thinking")

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


def refuse(fields: dict, names: dict[str, str], where: str = "") -> None:
    """ValueError: a field is there that would change what is learned and is not supported."""
    for name in names.keys() & fields.keys():
        if fields[name] not in EMPTY:
            if name != "label" or isinstance(fields[name], bool):  # any other label is a note
                raise ValueError(f"{where}{name!r} is not supported: {names[name]}")


def learns(fields: dict, where: str = "") -> bool:
    """Whether to learn from a row or a turn: what weight, train and loss say, 0/1 or false/true."""
    values = {name: fields[name] for name in LEARN if name in fields}
    for name, value in values.items():
        if value not in (0, 1):
            found = json.dumps(value, default=str)[:40]
            raise ValueError(f"{where}{name!r} must be 0 or 1 (false or true), found {found}")
    return all(values.values())


def document_learns(row: dict) -> bool:
    """Whether to learn from a row of pretraining; ValueError: a field that is not supported."""
    fields = {name: value for name, value in row.items() if value is not None}
    refuse(fields, REFUSED)
    return learns(fields)
