"""How chat templates spell calls, and constraints that follow from it."""

import json
import random
import sys

import pytest
import torch

from benchmarks.chat_templates import CASES, case_tokenizer
from dataset.chat_format import ChatCoder
from dataset.reference_answer import said
from runtime.serving.api_error import APIError
from runtime.serving.call_form import CallForm, learn_call_form
from runtime.serving.constraints import Grammars
from runtime.serving.reply_parts import ReplyParts

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def coders() -> dict[str, ChatCoder]:
    return {name: ChatCoder(case_tokenizer(name)) for name in CASES}


@pytest.fixture(scope="module")
def coder(tokenizer) -> ChatCoder:
    return ChatCoder(tokenizer)


def test_our_own(coder):
    assert learn_call_form(coder) == CallForm(
        "<tool_call>", "\n", "arguments", "\n", "</tool_call>", coder.end_of_turn
    )


def test_templates_of_others(coders):
    forms = {name: learn_call_form(coder) for name, coder in coders.items()}
    marked = {name for name, form in forms.items() if form and form.begin == "<tool_call>"}
    bare = {name: form for name, form in forms.items() if form and not form.begin}
    assert marked and bare and None in forms.values()
    for name, form in bare.items():
        assert form.key == "parameters"
        assert form.stop == coders[name].plain.ids["<|eom_id|>"]


def write(constraint, coder, seed: int = 0) -> str:
    """A reply that a model of random logits would write."""
    draw, ids = random.Random(seed), []
    while len(ids) < 300:
        allowed = constraint.allowed().nonzero().flatten().tolist()
        token = draw.choice(allowed)
        if token in coder.ends:
            break
        constraint.advance(token)
        ids.append(token)
    return coder.decode_reply(ids)


def test_constrained_calls_are_of_the_template_form(coder):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    form = learn_call_form(coder)
    grammars = Grammars(coder, len(coder.tokenizer) + 3)  # padded, as public models are
    for seed in range(5):
        text = write(grammars.calls(TOOLS, form, ""), coder, seed)
        parts = ReplyParts(False, form, frozenset("f")).add(text, is_last=True)
        arguments = json.loads("".join(part.text for part in parts))
        assert parts[0].name == "f" and 0 <= arguments["x"] <= 99
        calls = [{"name": "f", "arguments": arguments}]
        turns = [{"role": "user", "content": "q"}]
        turns.append({"role": "assistant", "content": "", "tool_calls": calls})
        assert said(coder, turns, TOOLS) == text  # as the template writes it


def test_a_constraint_begins_behind_the_thinking(coder):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    schema = TOOLS[0]["function"]["parameters"]
    constraint = Grammars(coder, len(coder.tokenizer)).json(schema, "<think>\n")
    assert constraint.allowed().sum() == len(coder.tokenizer) - 1  # all but the end
    constraint.advance(coder.plain("a")[0])
    constraint.advance(coder.plain.ids["</think>"])
    text = write(constraint, coder)
    assert text.startswith("\n\n{") and json.loads(text)


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"$ref": "#/nowhere"}, {"pattern": "("}, {"not": {}}], ids=str
)
def test_schemas_that_are_none(schema, coder):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    with pytest.raises(APIError) as error:
        Grammars(coder, len(coder.tokenizer)).json(schema, "")
    assert error.value.param == "response_format" and "\n" not in error.value.message


def test_without_llguidance_it_is_named(coder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(APIError, match="pip install llguidance"):
        Grammars(coder, len(coder.tokenizer)).json({"type": "object"}, "")


def test_templates_without_calls_cannot_be_forced(coder):
    with pytest.raises(APIError, match="no calls in JSON"):
        Grammars(coder, len(coder.tokenizer)).calls(TOOLS, None, "")


def test_the_end_is_allowed_where_json_is_complete(coder):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    constraint = Grammars(coder, len(coder.tokenizer)).json({"type": "integer"}, "")
    at_end = torch.tensor(coder.ends)
    assert not constraint.allowed()[at_end].any()
    constraint.advance(coder.plain("7")[0])
    assert constraint.allowed()[at_end].all()


@pytest.mark.parametrize("text", ["<|im_end|>", "a<tool_call>b", "</tool_call>", "<think>"])
def test_a_schema_that_spells_control_tokens(coder, text):
    """It is text in what is written, and ends nothing."""
    pytest.importorskip("llguidance", reason="pip install llguidance")
    grammars = Grammars(coder, len(coder.tokenizer))
    constraint = grammars.json({"const": text}, "")
    assert json.loads(write(constraint, coder)) == text and not constraint.error
    tool = {"name": "f", "parameters": {"properties": {"x": {"const": text}}, "required": ["x"]}}
    tool["parameters"]["additionalProperties"] = False
    form = learn_call_form(coder)
    written = write(grammars.calls([{"function": tool}], form, ""), coder)
    parts = ReplyParts(False, form, frozenset("f")).add(written, is_last=True)
    assert json.loads("".join(part.text for part in parts)) == {"x": text}


def test_grammars_without_end_and_too_large(coder):
    pytest.importorskip("llguidance", reason="pip install llguidance")
    grammars = Grammars(coder, len(coder.tokenizer))
    with pytest.raises(APIError, match="response_format: "):
        grammars.json({"$ref": "#"}, "")
    kinds = [
        {"type": "object", "properties": {f"k{n}": {}}, "required": [f"k{n}"]} for n in range(3000)
    ]
    constraint = grammars.json({"anyOf": kinds}, "")
    write(constraint, coder)
    assert (
        "2000" in constraint.error
    )  # an engine tells it, and no half reply passes for a whole one
    tool = {"name": "f", "parameters": {"type": "string"}}
    with pytest.raises(APIError) as refused:
        grammars.calls([{"function": tool}], learn_call_form(coder), "")
    assert refused.value.param == "tools[0].function.parameters.type"
