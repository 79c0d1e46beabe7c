"""Tool calls that a model is to make: whether name, arguments and JSON are right."""

from collections.abc import Callable

from dataset.replies import final_answer
from dataset.tool_calls import has_broken_call, parse_tool_calls
from dataset.tools import normalise_tool_calls


def read_expected_calls(answer: dict) -> list[dict]:
    """The calls of an answer {"tool_calls": [...]}, in the shape of an assistant turn.

    Raises:
        ValueError: it says something else, too, or no call can be read.
    """
    if unknown := {*answer} - {"role", "content", "tool_calls"}:
        fault = f"has {', '.join(map(repr, sorted(unknown)))}"
        raise ValueError(f"'answer' {fault}: only 'tool_calls' can be compared")
    if answer.get("role", "assistant") != "assistant" or answer.get("content"):
        raise ValueError("'answer' must be the assistant's tool_calls, without content")
    calls = normalise_tool_calls(answer.get("tool_calls"), "tool_calls", "'answer': ")
    if not calls:
        raise ValueError("'answer' must be a string or have 'tool_calls'")
    return calls


def check_offered(calls: list[dict], tools: list[dict] | None) -> None:
    """Refuse calls that no reply can make, as the row offers no such function: ValueError."""
    if not tools:
        raise ValueError("'answer' has tool calls, but the row offers no 'tools'")
    functions = [tool.get("function", tool) for tool in tools]
    offered = [function.get("name") for function in functions if isinstance(function, dict)]
    for call in calls:
        if call["name"] not in offered:
            names = ", ".join(map(str, offered))
            raise ValueError(f"'answer' calls {call['name']!r}, but 'tools' offers {names}")


def judge_calls(question: dict) -> None:
    """Fill in `valid_json`, `right_name`, `right_arguments` and `right` of an answered question.

    The order of calls does not count. Names are right where the reply has as many calls, to these
    functions; arguments are where they are equal as JSON besides.
    """
    content, calls = parse_tool_calls(final_answer(question["reply"]))
    expected = question["calls"]
    question["valid_json"] = bool(calls) and not has_broken_call(content)
    question["right_name"] = same_set(calls, expected, lambda a, b: a["name"] == b["name"])
    question["right_arguments"] = same_set(
        calls,
        expected,
        lambda a, b: a["name"] == b["name"] and same_json(a["arguments"], b["arguments"]),
    )
    question["right"] = question["right_arguments"] and question["valid_json"]


def same_set(ones: list[dict], others: list[dict], same: Callable[[dict, dict], bool]) -> bool:
    """Whether two lists are the same but for their order."""
    left = list(others)
    for one in ones:
        match = next((n for n, other in enumerate(left) if same(one, other)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def same_json(one: object, other: object) -> bool:
    """Whether two values are the same JSON: 1 is 1.0, but not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same_json(a, b) for a, b in pairs)
    return isinstance(one, bool) == isinstance(other, bool) and one == other
