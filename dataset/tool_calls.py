"""Tool calls that a model wrote, read back from the text of its reply.

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>    ours, Qwen; SmolLM2: a list in it
    [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]       Mistral
    {"name": ..., "parameters": {...}}                          Llama 3: all that the reply says

Other forms stay text.
"""

import json
import re
from json.decoder import JSONDecoder

from dataset.tools import normalise_tool_call

END = {"<tool_call>": "</tool_call>", "[TOOL_CALLS]": "", "<|python_tag|>": ""}
OPENING = re.compile("|".join(map(re.escape, END)))
BARE = re.compile(r'\s*\[?\s*\{\s*"(type|id|name|function|arguments|parameters)"')
ARGUMENTS = {"arguments", "parameters", "function"}
BLANK = re.compile(r"[\s;]*")  # Llama: semicolons between calls


def parse_tool_calls(text: str) -> tuple[str, list[dict]]:
    """Split a reply into what it says and what it calls.

    Args:
        text: a reply without its thinking, to a prompt that offered tools.

    Returns:
        content: what stands outside of calls, stripped. A call that cannot be read (broken JSON, no
            name, arguments that are no object) stays in it, as does one that was cut off.
        calls: [{"name": str, "arguments": dict}, ...], with "id" where the model wrote one.
    """
    said, calls, at = [], [], 0
    while opening := OPENING.search(text, at):
        read = _read_calls(text, opening.end(), END[opening[0]])
        end = read[1] if read else opening.end()
        said.append(text[at : opening.start() if read else end])
        calls += read[0] if read else []
        at = end
    if not said and BARE.match(text):
        read = _read_calls(text, 0, "", bare=True)
        if read and read[1] == len(text):
            return "", read[0]
    return "".join([*said, text[at:]]).strip(), calls


def has_broken_call(content: str) -> bool:
    """Whether what `parse_tool_calls` left as content holds a call that it could not read."""
    return bool(OPENING.search(content))


def _read_calls(
    text: str, at: int, closing: str, bare: bool = False
) -> tuple[list[dict], int] | None:
    """The calls from a position on, and where they end, behind the closing tag; None: no calls.

    The tag may be missing at the end of the text, as models leave it out. Bare calls have
    arguments: {"name": ...} alone may be any JSON.
    """
    calls: list[dict] = []
    at = BLANK.match(text, at).end()
    try:
        while text.startswith(("{", "["), at):
            value, at = DECODER.raw_decode(text, at)
            for call in value if isinstance(value, list) else [value]:
                calls.append(_as_call(call, bare))
            at = BLANK.match(text, at).end()
    except (ValueError, RecursionError):
        return None
    if not calls or not text.startswith(closing, at) and at < len(text):
        return None
    return calls, min(at + len(closing), len(text))


def _as_call(call: object, bare: bool) -> dict:
    """A call as `normalise_row` gives it. ValueError: it is none."""
    if bare and isinstance(call, dict) and ARGUMENTS.isdisjoint(call):
        raise ValueError("no arguments")
    if isinstance(call, dict) and "parameters" in call and "arguments" not in call:
        call = {"arguments" if key == "parameters" else key: call[key] for key in call}
    return normalise_tool_call(call, "")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


DECODER: JSONDecoder = json.JSONDecoder(parse_constant=_refuse)  # NaN and Infinity are no JSON
