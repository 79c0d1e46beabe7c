"""Replies piece by piece: whole characters, stop strings, thinking, calls; however they are cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT

from benchmarks.chat_templates import tokenizer_of
from dataset.tokenizer import load_tokenizer
from runtime.serving.call_form import CallForm
from runtime.serving.reply_parts import ObjectScanner, Part, ReplyParts
from runtime.serving.reply_text import StopStrings, TextDecoder

OURS = load_tokenizer(ROOT / "model" / "minimind_tokenizer")
MARKED = CallForm("<tool_call>", "\n", "arguments", "\n", "</tool_call>", 2)
BARE = CallForm("", "", "parameters", "", "", 2)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "a}\\"</tool_call>", "y": [1]}}\n</tool_call>'
ARGUMENTS = {"x": 'a}"</tool_call>', "y": [1]}


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces whose sizes repeat."""
    pieces, at, n = [], 0, 0
    while at < len(text):
        size = cuts[n % len(cuts)]
        pieces.append(text[at : at + size])
        at, n = at + size, n + 1
    return pieces


CUTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=50)
@given(st.lists(st.integers(3, 6399), max_size=60), CUTS)
def test_pieces_make_the_whole_text(ids, sizes):
    """Random ids: their bytes are often no UTF-8."""
    decoder, text, at, n = TextDecoder(OURS.decode), "", 0, 0
    while at < len(ids):
        size = sizes[n % len(sizes)]
        text += decoder.add(ids[at : at + size])
        at, n = at + size, n + 1
    assert text + decoder.end() == OURS.decode(ids)


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_other_tokenizers(kind):
    try:
        tokenizer = tokenizer_of(kind)
    except KeyError:
        pytest.skip(f"no tokenizer of the kind {kind}")
    ids = tokenizer.encode(
        "Say  this: \u4f60\u597d \U0001f469 , it's 3 .", add_special_tokens=False
    )
    for size in range(1, 12):  # ids that come at once
        decoder = TextDecoder(tokenizer.decode)
        text = "".join(decoder.add(ids[n : n + size]) for n in range(0, len(ids), size))
        assert text + decoder.end() == tokenizer.decode(ids)


@settings(max_examples=25)
@given(CUTS)
def test_stop_strings(cuts):
    filter = StopStrings(("stop", "op!", "stopper"))
    shown = "".join(filter.add(piece) for piece in pieces_of("sto, st, stop! op", cuts))
    assert (shown, filter.found) == ("sto, st, ", True)
    filter = StopStrings(("stop",))
    shown = "".join(filter.add(piece) for piece in pieces_of("a sto", cuts))
    assert shown == "a " and not filter.found and filter.end() == "sto"


def read(text: str, cuts: list[int], form=MARKED, thinks=False, **options) -> dict:
    """What comes of a reply: texts by kind, calls."""
    reader = ReplyParts(thinks, form, frozenset("fg"), **options)
    parts: list[Part] = []
    for piece in pieces_of(text, cuts):
        parts += reader.add(piece)
    parts += reader.add("", is_last=True)
    got = {"content": "", "thought": "", "calls": []}
    for part in parts:
        if part.kind == "tool_call":
            if part.name:
                assert part.id and part.index == len(got["calls"])
                got["calls"].append([part.name, ""])
            got["calls"][part.index][1] += part.text
        else:
            got["thought" if part.kind == "reasoning_content" else "content"] += part.text
    assert reader.calls == reader.ended_calls == len(got["calls"])
    return got


@settings(max_examples=25)
@given(CUTS)
def test_thinking(cuts):
    for text, thinks in (
        ("<think>\nso\n\n</think>\n\nyes\n", False),
        ("so\n\n</think>\n\nyes\n", True),
    ):
        assert read(text, cuts, thinks=thinks) == {
            "content": "yes\n",
            "thought": "so\n",
            "calls": [],
        }
    assert read("<think>\n\n</think>\n\nyes", cuts)["content"] == "yes"
    assert read("<think>\nnever done", cuts)["thought"] == "never done"
    assert read(" <thin", cuts)["content"] == " <thin"
    assert read("a <think> b", cuts)["content"] == "a <think> b"


@settings(max_examples=25)
@given(CUTS)
def test_calls(cuts):
    got = read(f"<think>\nhm\n</think>\n\nLook:\n{CALL}\n{CALL}", cuts)
    assert (got["thought"], got["content"]) == ("hm", "Look:")
    assert [(name, json.loads(text)) for name, text in got["calls"]] == [("f", ARGUMENTS)] * 2
    assert read(f"{CALL}\n{CALL}", cuts, is_single=True)["calls"][1:] == []
    assert read(CALL, cuts, form=None)["content"] == CALL


@settings(max_examples=25)
@given(CUTS)
def test_odd_calls(cuts):
    for text in (
        '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>',
        '<tool_call>[{"name": "f", "arguments": "{\\"x\\": 1}"}]</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}',
        '<tool_call>\n{"name":"f","parameters":{"x": 1}}</tool_call>',
    ):
        ((name, arguments),) = read(text, cuts)["calls"]
        assert name == "f" and json.loads(arguments) == {"x": 1}
    for text in ("<tool_call>", "<tool_call>nothing</tool_call> b", "a <tool_cal"):
        got = read(text, cuts)
        assert got["calls"] == [] and got["content"] == text
    broken = read('<tool_call>{"name": "f", "arguments": {"x": 1</tool_call>b', cuts)
    assert broken["calls"] == [["f", '{"x": 1']] and broken["content"] == "b"


@settings(max_examples=25)
@given(CUTS)
def test_calls_without_marks(cuts):
    ((name, arguments),) = read('{"name": "g", "parameters": {"x": 1}}', cuts, BARE)["calls"]
    assert name == "g" and json.loads(arguments) == {"x": 1}
    for text in ('{"name": "unknown", "parameters": {}}', '{"a": 1}', "{", "so {}"):
        assert read(text, cuts, BARE) == {"content": text, "thought": "", "calls": []}


def test_the_end_of_an_object():
    for text, size in (('{"a": "}"} x', 10), ("{[}]}", 3), ("{", 1)):
        assert ObjectScanner().scan(text, "</t>") <= size or size == 3
    scanner = ObjectScanner()
    assert scanner.scan('{"a', "</t>") == 3 and scanner.scan('": 1}}', "</t>") == 5


def test_bytes_that_are_no_character_do_not_hold_up_a_stream():
    """The first byte of a character of four, again and again."""
    byte = OURS.encode("\U0001f469", add_special_tokens=False)[0]
    assert OURS.decode([byte]) == "\ufffd"
    decoder, count = TextDecoder(OURS.decode), 200
    pieces = [decoder.add([byte]) for _ in range(count)]
    assert max(len(piece) for piece in pieces) < 10
    assert "".join(pieces) + decoder.end() == OURS.decode([byte] * count)
