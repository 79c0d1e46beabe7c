"""Tool calls in what models write: every form, in every template, and what is none."""

import json

import pytest
from test_chat_format import WEATHER, assistant, user

from benchmarks.chat_templates import case_tokenizer
from dataset.chat_format import ChatCoder
from dataset.reference_answer import said
from dataset.replies import final_answer
from dataset.tool_calls import has_broken_call, parse_tool_calls

CALL = {"name": "weather", "arguments": {"city": "北京", "days": 2, "deep": {"x": [1, None]}}}
OTHER = {"name": "search", "arguments": {}}
ONE, TWO = json.dumps(CALL, ensure_ascii=False), json.dumps(OTHER)
LLAMA = json.dumps({"name": "weather", "parameters": CALL["arguments"]})
TAGGED = f"<tool_call>\n{ONE}\n</tool_call>"


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("", "", []),
        ("sunny", "sunny", []),
        (TAGGED, "", [CALL]),
        (f"Let me see.\n{TAGGED}\n", "Let me see.", [CALL]),
        (f"{TAGGED}\n<tool_call>{TWO}</tool_call>", "", [CALL, OTHER]),
        (f"<tool_call>\n{ONE}\n{TWO}\n</tool_call>", "", [CALL, OTHER]),
        (f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", [CALL, OTHER]),  # SmolLM2
        (f"<tool_call>\n{ONE}", "", [CALL]),  # ended by its end-of-turn token
        (f'[TOOL_CALLS] [{ONE[:-1]}, "id": "abc123xyz"}}]', "", [CALL | {"id": "abc123xyz"}]),
        (LLAMA, "", [CALL]),
        (f"<|python_tag|>{LLAMA}; {TWO}", "", [CALL, OTHER]),
        (json.dumps({"type": "function", "function": CALL}), "", [CALL]),
        (json.dumps(CALL | {"arguments": json.dumps(CALL["arguments"])}), "", [CALL]),
        (TAGGED.replace("北京", "</tool_call>"), "", None),  # a tag inside of a string is text
        # No calls, left as they are
        ('{"name": "Bob"}', '{"name": "Bob"}', []),
        ('{"answer": 42}', '{"answer": 42}', []),
        (f"{ONE} is JSON", f"{ONE} is JSON", []),
        ("the <function> of x", "the <function> of x", []),
    ],
)
def test_calls_are_read_in_every_form(text, content, calls):
    said, found = parse_tool_calls(text)
    assert said == content and not has_broken_call(said)
    if calls is None:
        calls = [{"name": "weather", "arguments": CALL["arguments"] | {"city": "</tool_call>"}}]
    assert found == calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>\n{'name': 'weather'}\n</tool_call>",
        f"<tool_call>\n{ONE[:-3]}",  # cut off
        f"<tool_call>{ONE} and more</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        "<tool_call>" + "[" * 100_000,
        "<tool_call>" * 100_000,
    ],
    ids=range(13),
)
def test_broken_calls_stay_in_the_content(text):
    content, calls = parse_tool_calls(text)
    assert not calls and content == text and has_broken_call(content)


def test_a_whole_call_counts_beside_a_broken_one():
    content, calls = parse_tool_calls(f"{TAGGED}<tool_call>{{</tool_call>")
    assert calls == [CALL] and content == "<tool_call>{</tool_call>" and has_broken_call(content)


@pytest.mark.parametrize("name", ["ours", "llama3", "mistral", "qwen3"])
def test_what_a_template_writes_is_read_back(name):
    coder = ChatCoder(case_tokenizer(name))
    call = CALL | {"id": "call12345"} if name == "mistral" else CALL
    reply = said(coder, [user("q"), assistant("", tool_calls=[call])], [WEATHER])
    reply = final_answer(reply).removesuffix("<|eom_id|>")  # Llama 3 ends such a turn otherwise
    assert parse_tool_calls(reply) == ("", [call])
