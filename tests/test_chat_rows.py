"""Rows of the four formats to messages, and what is wrong with the others."""

import json

import pytest
from test_chat_format import CALL, SEARCH, WEATHER, assistant, system, tool, user

from dataset.chat_rows import detect_format, normalise_row

AB = [user("a"), assistant("b")]
CALLED = [user("a"), assistant("", tool_calls=[CALL]), tool("sunny"), assistant("b")]
CALL_JSON = json.dumps(CALL)
OPENAI_CALL = {"id": "1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
MINIMIND = [
    ({"conversations": AB}, AB, None),
    ({"task": "x", "conversations": [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
     [user("a"), assistant("b", reasoning_content="c")], None),
    ({"conversations": [user("a"), {"role": "assistant", "content": "b", "reasoning_content": None, "tool_calls": None,
                                    "tools": ""}], "tools": "[]"}, AB, None),
    ({"conversations": [{**system("s"), "tools": json.dumps([WEATHER])}, *AB]}, [system("s"), *AB], [WEATHER]),
    ({"conversations": AB, "tools": [WEATHER]}, AB, [WEATHER]),
    ({"conversations": AB, "tools": "null"}, AB, None),
    ({"conversations": AB, "tools": json.dumps([WEATHER, SEARCH])}, AB, [WEATHER, SEARCH]),
    ({"conversations": [user("a"), assistant("", tool_calls=json.dumps([CALL])), tool("sunny"), assistant("b")]},
     CALLED, None),
    ({"conversations": [user("a"), assistant(None, tool_calls=[{"function": CALL}]), tool("sunny"), assistant("b")]},
     CALLED, None),
    ({"conversations": [user(""), assistant("")]}, [user(""), assistant("")], None),
]  # fmt: skip
SHAREGPT = [
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, AB, None),
    ({"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "system": "s"},
     [system("s"), *AB], None),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                        {"from": "gpt", "value": "b"}], "tools": json.dumps([WEATHER])}, [system("s"), *AB], [WEATHER]),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": CALL_JSON},
                        {"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "b"}]}, CALLED, None),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": f"[{CALL_JSON}]"},
                        {"from": "tool", "value": "sunny"}, {"from": "gpt", "value": "b"}], "tools": ""}, CALLED, None),
]  # fmt: skip
ALPACA = [
    ({"instruction": "a", "output": "b"}, AB, None),
    ({"instruction": "a", "input": "", "output": "b", "system": "", "history": []}, AB, None),
    ({"instruction": "a", "input": None, "output": "b", "history": None}, AB, None),
    ({"instruction": "a", "input": "x", "output": "b", "system": "s", "history": [["q", "r"]]},
     [system("s"), user("q"), assistant("r"), user("a\nx"), assistant("b")], None),
]  # fmt: skip
OPENAI = [
    ({"messages": AB}, AB, None),
    ({"messages": [{"role": "developer", "content": "s"}, *AB]}, [system("s"), *AB], None),
    ({"messages": [user([{"type": "text", "text": "a"}]), assistant(["b"])]}, AB, None),
    ({"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant([])]},
     [user("ab"), assistant("")], None),
    ({"messages": [user("a"), {"role": "assistant", "tool_calls": [OPENAI_CALL]},
                   {"role": "tool", "tool_call_id": "1", "content": "sunny"}, assistant("b")], "tools": [WEATHER]},
     CALLED, [WEATHER]),
    ({"messages": [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": ""}}])]},
     [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {}}])], None),
]  # fmt: skip
GROUPS = {"minimind": MINIMIND, "sharegpt": SHAREGPT, "alpaca": ALPACA, "openai": OPENAI}


@pytest.mark.parametrize(("fmt", "case"), [(fmt, case) for fmt, cases in GROUPS.items() for case in cases])
def test_formats(fmt, case):
    row, messages, tools = case
    before = json.dumps(row)
    assert detect_format(row) == fmt
    assert normalise_row(row, fmt) == (messages, tools)
    assert json.dumps(row) == before  # the row is left as it was


def test_prompts_need_no_assistant_turn():
    assert normalise_row({"messages": [user("a")]}, "openai", need_assistant=False) == ([user("a")], None)


KNOWN = "(known: system, developer, user, human, assistant, gpt, function_call, tool, observation, function)"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, 2], "a row must be a JSON object, found a list"),
        ("text", "a row must be a JSON object, found a string"),
        (None, "a row must be a JSON object, found null"),
        (7, "a row must be a JSON object, found a number"),
        ({"text": "x", "id": 3}, "unknown schema, keys found: 'text', 'id'; accepted: {\"conversations\": [{\"role\""),
        ({}, "unknown schema, keys found: none; accepted:"),
        ({"conversations": []}, "empty conversation ('conversations' has no turns)"),
        ({"messages": []}, "empty conversation ('messages' has no turns)"),
        ({"conversations": "hello"}, "'conversations' must be a list of turns, found a string"),
        ({"messages": {"role": "user"}}, "'messages' must be a list of turns, found an object"),
        ({"messages": ["a", "b"]}, "turn 1 must be an object, found a string"),
        ({"conversations": [user("a"), {"role": "bot", "content": "b"}]}, f"turn 2: unknown role 'bot' {KNOWN}"),
        ({"conversations": [{"from": "User", "value": "b"}]}, f"turn 1: unknown role 'User' {KNOWN}"),
        ({"messages": [{"role": None, "content": "b"}]}, f"turn 1: unknown role None {KNOWN}"),
        ({"messages": [{"role": ["user"], "content": "b"}]}, f"turn 1: unknown role ['user'] {KNOWN}"),
        ({"messages": [{"content": "b"}]}, "turn 1 has no 'role' (keys found: content)"),
        ({"conversations": [{"from": "human", "value": "a"}, assistant("b")]}, "turn 2 has no 'from' (keys found: r"),
        ({"conversations": [user("a"), {"role": "assistant"}]}, "turn 2 has no 'content' (keys found: role)"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no 'value' (keys found: from)"),
        ({"conversations": [user(None), assistant("b")]}, "turn 1: 'content' must be a string, found null"),
        ({"conversations": [user("a"), assistant(None)]}, "turn 2: 'content' must be a string, found null"),
        ({"messages": [user(3), assistant("b")]}, "turn 1: 'content' must be a string, found a number"),
        ({"messages": [user(True), assistant("b")]}, "turn 1: 'content' must be a string, found a boolean"),
        ({"messages": [user({"a": 1}), assistant("b")]}, "turn 1: 'content' must be a string, found an object"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}])]},
         "turn 1: a content part must be text, found "),
        ({"messages": [user([{"type": "text"}]), assistant("b")]}, "turn 1: a content part must be text, found null"),
        ({"messages": [user("a"), tool("b")]}, "no assistant turn, so there is nothing to learn from"),
        ({"messages": [user("a"), system("s"), assistant("b")]}, "turn 2: a system turn must be the first turn"),
        ({"messages": [system("s"), system("s"), assistant("b")]}, "turn 2: a system turn must be the first turn"),
        ({"conversations": AB, "tools": "[{broken"}, "'tools' is not JSON (Expecting property name"),
        ({"conversations": AB, "tools": 5}, "'tools' must be a list, found a number"),
        ({"conversations": AB, "tools": ["f"]}, "'tools' must be a list of function objects"),
        ({"messages": [user("a"), assistant("", tool_calls="{oops")]}, "turn 2: 'tool_calls' is not JSON"),
        ({"conversations": AB, "tools": "[" * 100_000}, "'tools' is not JSON"),
        ({"messages": [user("a"), assistant("", tool_calls=["f"])]}, "turn 2: a tool call must be an object with"),
        ({"messages": [user("a"), assistant("", tool_calls=[{"name": ""}])]}, "turn 2: a tool call must be an object"),
        ({"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "{oops"}])]},
         "turn 2: the arguments of 'f' is not JSON"),
        ({"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": [1]}])]},
         "turn 2: the arguments of 'f' must be an object, found a list"),
        ({"messages": [{**user("a"), "tool_calls": [CALL]}]}, "turn 1: 'tool_calls' belongs on an assistant turn"),
        ({"messages": [{**user("a"), "reasoning_content": "x"}]}, "turn 1: 'reasoning_content' belongs on an"),
        ({"messages": [user("a"), assistant("b", reasoning_content=3)]},
         "turn 2: 'reasoning_content' must be a string, found a number"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather()"}]},
         "turn 2: 'value' is not JSON"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": ""}]},
         "turn 2: 'value' is not JSON"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": None}]},
         "turn 2: 'value' must be a string, found null"),
        ({"messages": [user("ok \ud83d"), assistant("b")]},
         "turn 1: 'content' has a lone surrogate \\ud83d at character 3"),
        ({"messages": [user("a"), assistant("b", reasoning_content="\udc00")]},
         "turn 2: 'reasoning_content' has a lone"),
        ({"messages": AB, "tools": [{"name": "\ud83d"}]}, "'tools' has a lone surrogate"),
        ({"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {"a": "\ud83d"}}])]},
         "turn 2: the call of 'f' has a lone surrogate"),
        ({"instruction": "a"}, "not a row of the alpaca format like the first"),
        ({"output": "a"}, "keys found: 'output'"),
        ({"instruction": "a", "output": None}, "'output' must be a string, found null"),
        ({"instruction": 3, "output": "b"}, "'instruction' must be a string, found a number"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be a string, found a number"),
        ({"instruction": "a", "output": "b", "history": [["q"]]},
         "'history' must be a list of [question, answer] pairs"),
        ({"instruction": "a", "output": "b", "history": [["q", None]]},
         "turn 2: 'content' must be a string, found null"),
        ({"instruction": "a", "output": "b", "system": 3}, "turn 1: 'content' must be a string, found a number"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(row, reason):
    with pytest.raises(ValueError) as caught:
        normalise_row(row, detect_format(row))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fmt", "other"), [(fmt, other) for fmt in GROUPS for other in GROUPS if fmt != other])
def test_a_row_of_another_format_is_refused(fmt, other):
    with pytest.raises(ValueError, match=f"not a row of the {fmt} format|turn 1 has no '(from|role)'"):
        normalise_row(GROUPS[other][0][0], fmt)
