"""Tools and their calls: how rows spell them."""

import json

from dataset.checks import check_text, json_type


def dump_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def parse_tools(value: object, where: str) -> list[dict]:
    """The function specs of a field, a list or its JSON; [] for none."""
    if not value:
        return []
    tools = _json_list(value, where)
    if any(not isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where} must be a list of function objects")
    check_text(dump_json(tools), where)
    return tools


def normalise_tool_calls(value: object, key: str, where: str) -> list[dict]:
    """The calls of a field, [{"name": str, "arguments": dict}, ...], each with its "id", if any."""
    return [normalise_tool_call(call, where) for call in _json_list(value, f"{where}{key!r}")]


def normalise_tool_call(call: object, where: str) -> dict:
    """{"function": {"name", "arguments"}} or {"name", "arguments"}; arguments may be JSON text."""
    known = {"id": call["id"]} if isinstance(call, dict) and isinstance(call.get("id"), str) else {}
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
    call = {"name": call["name"], "arguments": arguments, **known}
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
