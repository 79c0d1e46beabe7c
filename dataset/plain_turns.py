"""Conversations of roles and texts as text, in our own chat template, written directly.

No turn here spells a control token, so every <|im_start|> begins a turn and every <|im_end|> ends
one. All other conversations are for `chat_format.py`, which gives the same for these.
"""

import re

from dataset.our_template import END, ROLES, SAMPLE, START, is_ours
from dataset.plain_text import PlainText

FIELDS = {"role", "content", "loss"}  # of a message that is written here


def write_turns(messages: list[dict], added: re.Pattern, is_prompt: bool = False) -> str | None:
    """A conversation as text; None: it says more than roles and texts, or a control token.

    Args:
        added: finds added tokens in a text, see `PlainText`.
        is_prompt: it goes on to where the assistant is to speak.
    """
    text, controls = "", [START, END] * len(messages)
    for message in messages:
        role, content = message["role"], message.get("content")
        if not (message.keys() <= FIELDS and role in ROLES and isinstance(content, str)):
            return None
        text += f"{START}{role}\n{content}{END}\n"
    if is_prompt:
        text += f"{START}assistant\n"
        controls.append(START)
    if added.findall(text) != controls or "</think>" in text:
        return None
    return text


def writes_ours(tokenizer, texts: PlainText) -> bool:
    """Whether a tokenizer's chat template is ours, and `write_turns` gives the ids of that."""
    if not (texts.added and is_ours(tokenizer.chat_template) and {START, END} <= texts.ids.keys()):
        return False
    text = write_turns(SAMPLE, texts.added)
    ids = tokenizer.apply_chat_template(SAMPLE, return_dict=False)
    return text is not None and texts.encode([text]) == [ids]
