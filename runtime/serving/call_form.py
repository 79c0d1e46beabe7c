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
    stop: id of the token that ends a turn that calls.
    """

    begin: str
    gap: str
    key: str
    end_gap: str
    end: str
    stop: int


def learn_call_form(coder: ChatCoder) -> CallForm | None:
    """The form of calls in a tokenizer's chat template; None: it has none that is JSON."""
    _, reader = coder.readers
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
    begin = before.rstrip()
    tokens = list(coder.plain.tokens.finditer(behind))
    if begin:  # the first one may be the mark that ends the call
        tokens = [token for token in tokens if token[0] in reader.manner.ends]
    if not tokens:
        return None
    end = behind[: tokens[0].start()].strip()
    if bool(begin) != bool(end):
        return None
    gaps = before[len(begin) :], behind[: behind.index(end)] if end else ""
    stop = coder.plain.ids[tokens[0][0]]
    return CallForm(begin, gaps[0], found["key"], gaps[1], end, stop)
