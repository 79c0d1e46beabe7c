"""Rows of the four formats to messages, and what is wrong with the others."""

import json

import pytest
from test_chat_format import CALL, CODER, SEARCH, WEATHER, assistant, supervised, system, tool, user

from dataset import chat_rows, row_fields, turn_fields
from dataset.chat_rows import detect_format, normalise_row

AB = [user("a"), assistant("b")]
CALLED = [user("a"), assistant("", tool_calls=[CALL]), tool("sunny"), assistant("b")]
# Some chat templates show which call a result belongs to.
IDENTIFIED = [
    user("a"),
    assistant("", tool_calls=[CALL | {"id": "1"}]),
    tool("sunny") | {"tool_call_id": "1"},
    assistant("b"),
]
CALL_JSON = json.dumps(CALL)
OPENAI_CALL = {
    "id": "1",
    "type": "function",
    "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
}
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
     IDENTIFIED, [WEATHER]),
    ({"messages": [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": ""}}])]},
     [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {}}])], None),
]  # fmt: skip
GROUPS = {"minimind": MINIMIND, "sharegpt": SHAREGPT, "alpaca": ALPACA, "openai": OPENAI}


@pytest.mark.parametrize(
    ("fmt", "case"), [(fmt, case) for fmt, cases in GROUPS.items() for case in cases]
)
def test_formats(fmt, case):
    row, messages, tools = case
    before = json.dumps(row)
    assert detect_format(row) == fmt
    assert normalise_row(row, fmt) == (messages, tools)
    assert json.dumps(row) == before  # the row is left as it was


def test_prompts_need_no_assistant_turn():
    assert normalise_row({"messages": [user("a")]}, "openai", need_assistant=False) == (
        [user("a")],
        None,
    )


KNOWN = (
    "(known: system, developer, user, human, assistant, gpt, function_call, tool, observation,"
    " function)"
)


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
        ({"messages": [{"role": None, "content": "b"}]}, "turn 1 has no 'role' (keys found: content)"),
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
        ({"instruction": "a", "output": None}, "not a row of the alpaca format like the first"),
        ({"instruction": 3, "output": "b"}, "'instruction' must be a string, found a number"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be a string, found a number"),
        ({"instruction": "a", "output": "b", "history": [["q"]]},
         "'history' must be a list of [question, answer] pairs"),
        ({"instruction": "a", "output": "b", "history": [["q", None]]},
         "'history', pair 1: its assistant text must be a string, found null"),
        ({"instruction": "a", "output": "b", "system": 3}, "'system' must be a string, found a number"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(row, reason):
    with pytest.raises(ValueError) as caught:
        normalise_row(row, detect_format(row))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fmt", "other"), [(fmt, other) for fmt in GROUPS for other in GROUPS if fmt != other]
)
def test_a_row_of_another_format_is_refused(fmt, other):
    with pytest.raises(
        ValueError, match=f"not a row of the {fmt} format|turn 1 has no '(from|role)'"
    ):
        normalise_row(GROUPS[other][0][0], fmt)


# --------------------------------------------------------------------------------------------------
# Fields that change what is learned, and null
# --------------------------------------------------------------------------------------------------

FOUR = {"minimind": {"conversations": AB}, "openai": {"messages": AB}, "alpaca": {"instruction": "a", "output": "b"},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}}  # fmt: skip
SYSTEM_TURN = {
    "openai": system("s"),
    "minimind": system("s"),
    "sharegpt": {"from": "system", "value": "s"},
}


def normalised(row, **more):
    return normalise_row(row, detect_format(row), **more)


def reason_of(row, **more) -> str:
    with pytest.raises(ValueError) as caught:
        normalised(row, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fmt", FOUR)
def test_a_system_text_counts_in_every_format(fmt):
    row = FOUR[fmt] | {"system": "s"}
    assert normalised(row) == ([system("s"), *AB], None)
    if fmt != "alpaca":
        key = "messages" if fmt == "openai" else "conversations"
        both = row | {key: [SYSTEM_TURN[fmt], *row[key]]}
        assert normalised(both) == ([system("s"), *AB], None)  # twice the same
        assert "'system' and the system turn differ" in reason_of(both | {"system": "other"})
    assert "'system' must be a string" in reason_of(row | {"system": ["s"]})
    prompt = {"messages": AB[:1], "system": "s"} if fmt == "openai" else row
    assert normalised(prompt, need_assistant=False)[0][:2] == [system("s"), AB[0]]


@pytest.mark.parametrize("fmt", FOUR)
@pytest.mark.parametrize("field", ["weight", "train", "loss"])
def test_weights_of_rows_and_turns_are_obeyed(fmt, field):
    masked = [user("a"), assistant("b", loss=False)]
    for yes, no in ((1, 0), (True, False), (1.0, 0.0)):
        assert normalised(FOUR[fmt] | {field: yes}) == (AB, None)
        assert normalised(FOUR[fmt] | {field: no}) == (masked, None)
    assert f"{field!r} must be 0 or 1 (false or true), found 0.5" in reason_of(
        FOUR[fmt] | {field: 0.5}
    )
    if fmt == "alpaca":
        return
    ((key, (question, answer)),) = FOUR[fmt].items()
    assert normalised({key: [question | {field: 0}, answer | {field: 1}]}) == (AB, None)
    assert normalised({key: [question, answer | {field: 0}]}) == (masked, None)
    assert f"turn 2: {field!r} must be 0 or 1" in reason_of(
        {key: [question, answer | {field: "no"}]}
    )
    assert f"turn 1: {field!r} asks to learn from" in reason_of(
        {key: [question | {field: 1}, answer]}
    )


def test_turns_that_are_not_learned_carry_no_loss():
    turns = [*AB, user("c"), assistant("d", weight=0), user("e"), assistant("f", train=True)]
    (chat,) = CODER.encode_chats([normalised({"messages": turns})])
    assert supervised(*chat) == "b<|im_end|>f<|im_end|>"
    (chat,) = CODER.encode_chats([normalised({"messages": turns[:4]})], "last")
    assert supervised(*chat) == ""


def test_reasoning_and_function_calls_by_their_other_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        expected = [user("a"), assistant("b", reasoning_content="t")]
        assert normalised({"messages": [user("a"), assistant("b", **{name: "t"})]}) == (
            expected,
            None,
        )
        assert normalised(FOUR["alpaca"] | {name: "t"}) == (expected, None)
        assert f"{name!r} is not supported: it belongs on an assistant turn" in reason_of(
            {"messages": AB, name: "t"}
        )
        assert f"turn 1: {name!r} belongs on an assistant" in reason_of(
            {"messages": [user("a") | {name: "t"}, AB[1]]}
        )
    both = assistant("b", reasoning="t", reasoning_content="t")
    assert normalised({"messages": [user("a"), both]})[0][1]["reasoning_content"] == "t"
    differ = {"messages": [user("a"), both | {"reasoning": "x"}]}
    assert "'reasoning_content' and 'reasoning' differ" in reason_of(differ)
    called = {"role": "assistant", "content": None, "function_call": OPENAI_CALL["function"]}
    turns = [
        user("a"),
        called,
        {"role": "function", "name": "weather", "content": "sunny"},
        assistant("b"),
    ]
    named = [*CALLED[:2], CALLED[2] | {"name": "weather"}, CALLED[3]]
    assert normalised({"messages": turns, "functions": [WEATHER], "function_call": "auto"}) == (
        named,
        [WEATHER],
    )
    assert normalised({"messages": AB, "functions": [WEATHER], "tools": [WEATHER]}) == (
        AB,
        [WEATHER],
    )
    assert normalised({"messages": [{**system("s"), "functions": [WEATHER]}, *AB]})[1] == [WEATHER]
    assert "are there twice and differ" in reason_of(
        {"messages": AB, "functions": [WEATHER], "tools": [SEARCH]}
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": AB, "images": ["a.png"]},
            "'images' is not supported: the model reads text only",
        ),
        (
            {"conversations": [user("a") | {"audios": ["a.wav"]}, AB[1]]},
            "turn 1: 'audios' is not supported",
        ),
        (
            {"messages": AB, "mask": [0, 1]},
            "'mask' is not supported: say what is learned with 'weight'",
        ),
        (
            {"messages": [user("a"), assistant("b", loss_mask=[1])]},
            "turn 2: 'loss_mask' is not supported",
        ),
        ({"messages": [user("a"), assistant("b", mask=False)]}, "turn 2: 'mask' is not supported"),
        ({"messages": [user("a") | {"name": "Bob"}, AB[1]]}, "turn 1: 'name' is not supported"),
        (
            {"messages": [user("a"), assistant("b", refusal="no")]},
            "turn 2: 'refusal' is not supported",
        ),
        ({"messages": AB, "tool_choice": "none"}, "'tool_choice' of a row must be \"auto\""),
        (
            {"messages": AB, "function_call": {"name": "f"}},
            "'function_call' of a row must be \"auto\"",
        ),
        (
            {"messages": AB, "kto_tag": False},
            "'kto_tag' is not supported: no stage learns from single judgements",
        ),
        (
            {"instruction": "a", "output": "b", "label": True},
            "'label' is not supported: no stage learns from single",
        ),
        (
            {"messages": AB, "system_prompt": "s"},
            "'system_prompt' is not supported: rename it to 'system'",
        ),
        (
            {"messages": [user("a"), assistant("", tool_calls=[CALL], function_call=CALL)]},
            "are both calls",
        ),
        (
            {"messages": [user("a"), assistant("b", tools=[WEATHER])]},
            "turn 2: 'tools' belongs on the row or on the",
        ),
    ],
)
def test_fields_that_we_do_not_obey_are_refused_by_name(row, reason):
    assert reason in reason_of(row)
    assert "\n" not in reason_of(row)


def test_other_fields_are_notes():
    notes = {
        "id": 7,
        "source": "x",
        "score": 0.5,
        "lang": "en",
        "label": 3,
        "category": "qa",
        "tool_choice": "auto",
    }
    turns = [
        {**user("a"), "id": 1},
        {**assistant("b"), "id": 2, "model": "x", "annotations": [], "name": ""},
    ]
    assert normalised({"messages": turns, "images": [], **notes}) == (AB, None)
    assert (
        normalised(
            {"messages": AB[:1], "label": True, "reasoning": "x", **notes}, need_assistant=False
        )[0]
        == AB[:1]
    )
    assert "'images'" in reason_of({"messages": AB[:1], "images": ["x"]}, need_assistant=False)


def test_turns_are_counted_as_the_file_has_them():
    wrong = [user("a"), {"role": "bot", "content": "b"}]
    assert reason_of({"messages": wrong, "system": "s"}).startswith("turn 2: unknown role 'bot'")
    shares = [{"from": "human", "value": "a"}, {"from": "gpt", "value": 3}]
    assert reason_of({"conversations": shares, "system": "s"}).startswith(
        "turn 2: 'value' must be a string"
    )
    row = {"instruction": 3, "output": "b", "system": "s", "history": [["q", "r"]]}
    assert reason_of(row) == "'instruction' must be a string, found a number"
    row |= {"instruction": "a", "history": [["q", "r"], [1, "r"]]}
    assert reason_of(row).startswith("'history', pair 2: its user text must be a string")


NULLS = dict.fromkeys(
    "conversations messages instruction input output history system tools functions weight train"
    " loss mask images reasoning reasoning_content tool_calls function_call tool_choice name from"
    " value role content label".split()
)


def with_nulls(row: dict) -> dict:
    """A row of a merged table: it has every column, and every field of a turn."""
    lists = {
        key: [NULLS | turn for turn in row[key]]
        for key in ("messages", "conversations")
        if key in row
    }
    return NULLS | row | lists


@pytest.mark.parametrize(
    ("fmt", "case"), [(fmt, case) for fmt, cases in GROUPS.items() for case in cases]
)
def test_a_field_with_null_is_not_there(fmt, case):
    row, messages, tools = case
    assert detect_format(with_nulls(row)) == fmt
    assert normalised(with_nulls(row)) == (messages, tools)


def test_null_inside_of_parts_and_calls():
    part = {"type": "text", "text": "a", "image_url": None}
    call = {"id": None, "name": None, "function": {**CALL, "description": None}, "type": "function"}
    turns = [user([part]), assistant(None, tool_calls=[call]), tool("sunny"), assistant("b")]
    assert normalised({"messages": turns}) == (CALLED, None)
    call = {"function": None, **CALL}
    assert normalised({"messages": [turns[0], assistant(None, tool_calls=[call]), *turns[2:]]}) == (
        CALLED,
        None,
    )
    assert normalised({"messages": [user("a"), assistant("", function_call={"name": "f", "arguments": None})]}) == (
        [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {}}])], None)  # fmt: skip
    assert (
        reason_of(with_nulls({"messages": [user("a"), assistant(None)]}))
        == "turn 2: 'content' must be a string, found null"
    )


def test_the_fields_that_change_what_is_learned_are_all_known():
    """What `SPECIAL` lacks would be read over; what it has in excess would cost time only."""
    known = {*row_fields.REFUSED_ON_ROWS, *row_fields.REFUSED_ON_TURNS, *row_fields.THINKING}
    known |= {*row_fields.LEARN, *turn_fields.CALLS, *turn_fields.TOOLS, "system", "tool_choice"}
    known |= {"tool_call_id"}
    assert chat_rows.SPECIAL == known
