"""How a chat template spells the call of a function, learned from what it writes."""

import re
from dataclasses import dataclass

from dataset.chat_format import ChatCoder
from dataset.replies import END_THINK
from dataset.template_layout import as_call

NAME, KEY, VALUE = "qnameq", "qkeyq", "qvalueq"
ARGUMENTS = rf'(?:\{{\s*"{KEY}":\s*"{VALUE}"\s*\}}|"\{{\\"{KEY}\\":\s*\\"{VALUE}\\"\}}")'
CALL = re.compile(
    rf'\{{\s*"name":\s*"{NAME}",\s*"(?P<key>arguments|parameters)":\s*{ARGUMENTS}\s*\}}'
)


@dataclass(frozen=True)
class CallForm:
    """A call is `begin`, `gap`, {"name": ..., "arguments": {...}}, `end_gap`, `end`.

    begin: "<tool_call>", say; "": a reply that is JSON is a call. key: what holds the arguments.
    """

    begin: str
    gap: str
    key: str
    end_gap: str
    end: str


def learn_call_form(coder: ChatCoder) -> CallForm | None:
    """The form of calls in a tokenizer's chat template; None: it has none that is JSON."""
    reader = coder.tool_reader
    template, user = reader.template, {"role": "user", "content": "q"}
    tools = [{"type": "function", "function": {"name": NAME, "parameters": {"type": "object"}}}]
    call = as_call({"name": NAME, "arguments": {KEY: VALUE}}, reader.manner.text_arguments)
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        prompt = template.render([user], tools, add_generation_prompt=True)
        text = template.render([user, answer], tools)
    except ValueError:
        return None
    common = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), None)
    said = text[min(len(prompt), len(text)) if common is None else common :]
    found = CALL.search(said)
    if not found:
        return None
    before = said[: found.start()].rpartition(END_THINK)[2].lstrip()
    behind = said[found.end() :]
    token = coder.plain.tokens.search(behind)
    while token and token[0] not in reader.manner.ends:  # a mark of the call itself
        token = coder.plain.tokens.search(behind, token.end())
    behind = behind[: token.start()] if token else behind
    begin, end = before.rstrip(), behind.strip()
    if bool(begin) != bool(end):
        return None
    gap = before[len(begin) :]
    end_gap = behind[: behind.index(end)] if end else ""
    return CallForm(begin, gap, found["key"], end_gap, end)
