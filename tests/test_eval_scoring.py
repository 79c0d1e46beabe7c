"""eval_model.py --eval_file: the table, the replies it writes, and rows that cannot be scored."""

import gzip
import json
import re
from pathlib import Path

import pytest
import test_eval_model
import torch
from test_eval_model import FACTS, SECOND_TURN, error, ok, turns

from runtime.scoring import replies as replies_module
from runtime.scoring import score

knowing, ignorant = test_eval_model.knowing, test_eval_model.ignorant
run, run_apart = test_eval_model.run, test_eval_model.run_apart


def question(text: str, answer: str, task: str = "facts", **more) -> dict:
    return {"task": task, "conversations": turns(text), "answer": answer, **more}


QUESTIONS = [
    question("hi", " Hello, you! ", "greeting"),  # compared without the space around it
    question("who are you?", FACTS["who are you?"]),
    question("你是谁", FACTS["你是谁"]),
    question("2+3", "6"),
    {
        "task": "greeting",
        "conversations": turns("hi", FACTS["hi"], "and again?"),
        "answer": SECOND_TURN[1],
    },
]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_scoring_prints_a_table_and_writes_every_reply(
    run, run_apart, knowing, write_jsonl, tmp_path, batch_size
):
    rows = write_jsonl(tmp_path / "held_out.jsonl", QUESTIONS)
    out = tmp_path / "replies.jsonl"
    flags = ["--eval_file", rows, "--eval_out", out, "--batch_size", batch_size, "--show_wrong", 3]
    start = run_apart if batch_size == 64 else run
    lines = ok(start(knowing, *flags)).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["task", "n", "right", "%", "95", "%", "CI"],
        ["facts", "3", "2", "66.7", "20.8-93.9"],
        ["greeting", "2", "2", "100.0", "34.2-100.0"],
        ["total", "5", "4", "80.0", "37.6-96.4"],
    ]
    assert re.fullmatch(r"5 prompts in \d+\.\d s", lines[4])
    assert lines[6:] == ["line 4 (facts)", '  prompt "2+3"', '  answer "6"', '  reply  "5"']
    replies = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [reply["line"] for reply in replies] == [1, 2, 3, 4, 5]
    assert [reply["right"] for reply in replies] == [True, True, True, False, True]
    assert replies[1]["reply"] == FACTS["who are you?"] and replies[3]["reply"] == "5"
    assert not list(tmp_path.glob("*.tmp"))


def test_thinking_is_not_the_answer_on_either_side(run, knowing, write_jsonl, tmp_path):
    """The model thinks unasked, for longer than twice the answer."""
    thought = FACTS["6*7"]
    answers = [
        "42",
        thought,
        "<think>\nby heart\n</think>\n\n 42\n",
        "41",
        thought.replace("42", "41"),
    ]
    rows = [question("6*7", answer) for answer in answers] + [
        question("2+3", "<think>\nx\n</think>\n\n5")
    ]
    out = tmp_path / "replies.jsonl"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = ok(run(knowing, "--eval_file", path, "--eval_out", out)).splitlines()
    assert lines[2].split()[:4] == ["total", "6", "4", "66.7"]
    replies = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [reply["right"] for reply in replies] == [True, True, True, False, False, True]
    assert [reply["reply"] for reply in replies] == [thought] * 5 + ["5"]  # what the model wrote


@pytest.mark.parametrize(
    "reply, right", [("6x7\n</think>\n\n42", True), ("42", False)], ids=["whole", "cut off"]
)
def test_with_thinking_asked_for(
    run, ignorant, write_jsonl, tmp_path, tokenizer, monkeypatch, reply, right
):
    """<think> stands in the prompt. Thoughts that do not end are no answer."""

    def scripted(model, prompts, *args, **options):
        for at, token in enumerate(tokenizer.encode(reply)):
            yield torch.tensor([0]), torch.tensor([at]), torch.tensor([token])

    monkeypatch.setattr(replies_module, "generate_batch", scripted)
    path, out = (
        write_jsonl(tmp_path / "rows.jsonl", [question("6*7", "42")]),
        tmp_path / "replies.jsonl",
    )
    ok(run(ignorant, "--eval_file", path, "--eval_out", out, "--thinking", 1))
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["reply"], written["right"]) == (f"<think>\n{reply}", right)


def test_scoring_is_greedy_and_takes_rows_of_the_other_formats(run, knowing, write_jsonl, tmp_path):
    rows = [{"messages": turns("hi"), "answer": "Hello, you!"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    output = ok(run(knowing, "--eval_file", path, "--temperature", 5, "--repetition_penalty", 9))
    assert output.splitlines()[1].split()[:4] == ["all", "1", "1", "100.0"]


def test_scoring_a_model_that_knows_nothing_ends(run, ignorant, write_jsonl, tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [question(f"how much is {n}?", f"{n}") for n in range(70)]
    )
    assert ok(run(ignorant, "--eval_file", path)).splitlines()[-2].split() == [
        "total",
        "70",
        "0",
        "0.0",
        "0.0-5.2",
    ]


def test_patterns_and_turns_that_the_model_answers_itself(run, knowing, write_jsonl, tmp_path):
    """A reply may be right in several words; of two user turns the model answers the first, too."""
    first, second = {"role": "user", "content": "hi"}, {"role": "user", "content": SECOND_TURN[0]}
    rows = [
        {"task": "a", "conversations": [first], "accept": ["nothing", "^HELLO,"]},
        {"task": "a", "conversations": [first], "accept": ["^you"]},
        {"task": "b", "conversations": [first, second], "accept": [re.escape(SECOND_TURN[1])]},
        {"task": "b", "conversations": [second, first, second], "answer": SECOND_TURN[1]},
        {
            "task": "b",
            "conversations": turns("hi", FACTS["hi"], SECOND_TURN[0]),
            "answer": SECOND_TURN[1],
        },
    ]
    path, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "replies.jsonl"
    ok(run(knowing, "--eval_file", path, "--eval_out", out))
    replies = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [reply["right"] for reply in replies[:3]] == [True, False, True] and replies[4]["right"]
    assert replies[0]["accept"] == ["nothing", "^HELLO,"] and "answer" not in replies[0]
    assert "conversations" not in replies[0] and replies[2]["conversations"] == [first, second]
    assert replies[2]["reply"] == replies[4]["reply"] == SECOND_TURN[1]


BAD_ROWS = {
    "broken json": ('{"task": ', "broken JSON"),
    "not an object": ("[1]", "object"),
    "no conversation": ({"task": "a", "answer": "b"}, "conversations"),
    "no answer": ({"task": "a", "conversations": turns("hi")}, "'answer'"),
    "an answer that is no text": (question("hi", 5), "'answer'"),
    "no pattern": (
        {"conversations": turns("hi"), "accept": []},
        "'accept' must be a list of regular expressions",
    ),
    "a pattern that is none": (
        {"conversations": turns("hi"), "accept": ["(a"]},
        "'(a' is no regular expression",
    ),
    "an empty pattern": ({"conversations": turns("hi"), "accept": ["x", ""]}, "an empty regular"),
    "an answer and patterns": (question("hi", "a", accept=["a"]), "'answer' or 'accept', not both"),
    "turns that are too long together": (
        {"conversations": [{"role": "user", "content": "word " * 60}] * 3, "accept": ["x"]},
        "context of the model is 128",
    ),
    "a task that is no text": (question("hi", "x", task=[1]), "'task'"),
    "the answer in the conversation": (
        {"conversations": turns("hi", "yes"), "answer": "yes"},
        "last turn",
    ),
    "unknown role": ({"conversations": [{"role": "boss", "content": "hi"}], "answer": "x"}, "role"),
    "null content": (
        {"conversations": [{"role": "user", "content": None}], "answer": "x"},
        "content",
    ),
    "half a surrogate pair": (json.dumps(question("hi", "\ud800")), "surrogate"),
    "too long": (question("word " * 500, "x"), "context of the model is 128"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(run, knowing, write_jsonl, tmp_path, name):
    row, reason = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [QUESTIONS[0], row, QUESTIONS[1]])
    out = tmp_path / "replies.jsonl"
    message = error(run(knowing, "--eval_file", path, "--eval_out", out))
    if name == "not an object":
        assert reason in message and f"{path}:" in message
    else:
        assert message.startswith(f"error: {path}:2: ") and reason in message
    assert not out.exists()


def test_rows_that_share_a_line_are_told_apart(run, knowing, tmp_path):
    path, out = tmp_path / "rows.json", tmp_path / "replies.jsonl"
    path.write_text(json.dumps([QUESTIONS[0], question("hi", "no")]))
    output = ok(run(knowing, "--eval_file", path, "--eval_out", out, "--show_wrong", 2))
    assert "line 1, row 2 (" in output
    assert [json.loads(line).get("row") for line in out.read_text().splitlines()] == [None, 2]
    path.write_text(json.dumps([QUESTIONS[0], {"task": "x"}]))
    assert f"{path}:1, row 2: unknown" in error(run(knowing, "--eval_file", path))


def test_a_pattern_without_end_is_stopped(run, knowing, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(replies_module, "SECONDS", 0.05)
    rows = [QUESTIONS[0], {"conversations": turns("hi"), "accept": ["((((((.+)+)+)+)+)+)+$x"]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = error(run(knowing, "--eval_file", path))
    assert message.startswith(f"error: {path}:2: 'accept': ") and "more than 0.05 s" in message


def test_files_that_cannot_be_scored(run, knowing, write_jsonl, tmp_path):
    assert "no such file" in error(run(knowing, "--eval_file", tmp_path / "none.jsonl"))
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert f"{empty}: no rows" in error(run(knowing, "--eval_file", empty))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(QUESTIONS[0]).encode() + b'\n{"caf\xe9": 1}\n')
    assert f"{latin}:2: byte 0xe9" in error(run(knowing, "--eval_file", latin))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(QUESTIONS[0]).encode()))
    assert f"{packed}: this is compressed with gzip: gzip -dc" in error(
        run(knowing, "--eval_file", packed)
    )
    rows = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    assert "--eval_out" in error(
        run(knowing, "--eval_file", rows, "--eval_out", tmp_path / "no" / "folder.jsonl")
    )
    assert "--eval_out" in error(run(knowing, "--eval_file", rows, "--eval_out", tmp_path))


OUTPUTS = {
    "a folder": ("", "Is a directory"),
    "no such folder": ("no/replies.jsonl", "No such file or directory"),
    "a file for a folder": ("rows.jsonl/replies.jsonl", "Not a directory"),
    "a name that is too long": ("x" * 300, "File name too long"),
    "a file system that takes no files": ("/proc/replies.jsonl", "cannot be written"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_written_is_noticed_first(run, write_jsonl, tmp_path, name):
    """Before the model is loaded. Permissions alone do not tell: root has all of them."""
    path, reason = OUTPUTS[name]
    rows, out = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS), tmp_path / path
    message = error(run(tmp_path, "--eval_file", rows, "--eval_out", out))
    assert message.startswith(f"error: --eval_out {out}: ") and reason in message


def test_an_output_is_tried_without_leaving_anything(run, ignorant, write_jsonl, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS[:1])
    out = write_jsonl(tmp_path / ("x" * 255), ["before"])
    broken = write_jsonl(tmp_path / "broken.jsonl", ["{"])
    error(run(ignorant, "--eval_file", broken, "--eval_out", out))
    assert out.read_text() == "before\n" and set(tmp_path.iterdir()) == {rows, out, broken}
    ok(run(ignorant, "--eval_file", rows, "--eval_out", out))
    assert json.loads(out.read_text())["line"] == 1 and set(tmp_path.iterdir()) == {
        rows,
        out,
        broken,
    }


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    assert score.temporary_path(Path("/dev/null")) == Path("/dev/null")
    assert score.temporary_path(tmp_path / "new").parent == tmp_path
