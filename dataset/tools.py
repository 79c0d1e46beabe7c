"""Tools and their calls: how rows spell them, and how the chat layout writes them."""

import json

from dataset.checks import check_text, json_type

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOLS_HEAD = (
    "# Tools\n\nYou can call these functions, given as one JSON object per line:\n<tools>\n"
)
TOOLS_TAIL = "</tools>\n\nTo call a function, answer with its name and its arguments as JSON:\n"
TOOLS_SHAPE = '\n{"name": "...", "arguments": {...}}\n'


def dump_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def tools_segments(system: str, tools: list[dict]) -> list[tuple[str, bool]]:
    """The system turn that offers tools, as (text, control).

    Its last two control tokens are the layout's own, never the row's.
    """
    listed = "".join(dump_json(tool) + "\n" for tool in tools)
    text = (system + "\n\n" if system else "") + TOOLS_HEAD + listed + TOOLS_TAIL
    return [(text, False), (TOOL_CALL, True), (TOOLS_SHAPE, False), (END_TOOL_CALL, True)]


def call_segments(calls: list[dict], text: str, has_content: bool) -> list[tuple[str, bool]]:
    """The text of an assistant turn and the calls behind it, a line each, as (text, control)."""
    segments = []
    for n, call in enumerate(calls):
        call = call.get("function") or call
        text += "\n" if has_content or n > 0 else ""
        shown = dump_json({"name": call["name"], "arguments": call["arguments"]})
        segments += [(text, False), (TOOL_CALL, True), (f"\n{shown}\n", False)]
        segments.append((END_TOOL_CALL, True))
        text = ""
    return segments


def parse_tools(value: object, where: str) -> list[dict]:
    """The function specs of a field, a list or its JSON; [] for none."""
    if not value:
        return []
    tools = _json_list(value, where)
    if any(not isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where} must be a list of function objects")
    check_text(dump_json(tools), where)
    return tools


def parse_tool_calls(value: object, key: str, where: str) -> list[dict]:
    """The calls of a field, [{"name": str, "arguments": dict}, ...]."""
    return [_tool_call(call, where) for call in _json_list(value, f"{where}{key!r}")]


def _tool_call(call: object, where: str) -> dict:
    """{"function": {"name", "arguments"}} or {"name", "arguments"}; arguments may be JSON text."""
    call = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise ValueError(f"{where}a tool call must be an object with a 'name' and 'arguments'")
    of = f"{where}the arguments of {call['name']!r}"
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", of)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"{of} must be an object, found {json_type(arguments)}")
    call = {"name": call["name"], "arguments": arguments}
    check_text(dump_json(call), f"{where}the call of {call['name']!r}")
    return call


def _json_list(value: object, where: str) -> list:
    value = _parse_json(value, where) if isinstance(value, str) else value
    if isinstance(value, dict):
        value = [value]
    if value is None:
        value = []
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, found {json_type(value)}")
    return value


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
