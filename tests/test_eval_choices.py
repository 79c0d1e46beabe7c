"""eval_model.py on questions with choices, tool calls and texts: against naive computations."""

import json
import math

import pytest
import test_eval_model
import torch
from conftest import write_jsonl
from test_eval_model import FACTS, error, ok, save, turns

from dataset.chat_format import ChatCoder
from dataset.choice_rows import read_choice_row
from model.lm import LMConfig, MiniMindLM
from model.weights import load_model
from runtime.scoring.table import wilson_interval

knowing, ignorant = test_eval_model.knowing, test_eval_model.ignorant
run = test_eval_model.run
TOLERANCE = dict(rel=1e-5, abs=1e-5)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def naive_logprob(model: MiniMindLM, prompt: list[int], ids: list[int]) -> float:
    """The log-probability of ids behind a prompt, a row alone."""
    logits = model(torch.tensor([[*prompt, *ids[:-1]]])).logits[0].double().log_softmax(-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1)
    return float(logits[at, torch.tensor(ids)].sum())


@pytest.fixture(scope="module")
def weights(ignorant):
    return load_model(ignorant / "full_sft_64.pth").eval()


# --------------------------------------------------------------------------------------------------
# Choices
# --------------------------------------------------------------------------------------------------

CHOICES = ["Paris", "Rome, the city of seven hills", "A", "北京"]
OURS = {"task": "ours", "prompt": "The capital of France is", "choices": CHOICES, "answer": 0}
CHAT = {"task": "chat", "conversations": turns("hi", "hello", "capital?"), "choices": CHOICES[:3],
        "answer": "Paris"}  # fmt: skip
MMLU = {"subject": "mmlu", "question": "2 + 3?", "choices": ["4", "5", "6", "7"], "answer": 1}
CEVAL = {"task": "ceval", "id": 0, "question": "天空是什么颜色？", "A": "红", "B": "绿", "C": "蓝",
         "D": "黑", "answer": "C", "explanation": ""}  # fmt: skip
ARC = {"task": "arc", "id": "x", "question": "Which is hot?", "answerKey": "2",
       "choices": {"text": ["ice", "a fire"], "label": ["1", "2"]}}  # fmt: skip
TEXTS = {
    "ours": ("The capital of France is", CHOICES),
    "mmlu": ("2 + 3?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:", list("ABCD")),
    "ceval": ("天空是什么颜色？\nA. 红\nB. 绿\nC. 蓝\nD. 黑\n答案：", list("ABCD")),
    "arc": ("Question: Which is hot?\nAnswer:", ["ice", "a fire"]),
}


@pytest.mark.parametrize("raw", [0, 1])
def test_choices_are_scored_as_naively_row_by_row(run, ignorant, weights, tokenizer, tmp_path, raw):
    rows = [OURS, MMLU, CEVAL, ARC] + ([] if raw else [CHAT])
    path, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    ok(run(ignorant, "--eval_file", path, "--eval_out", out, "--raw", raw))
    written = rows_of(out)
    for row in written:
        if raw:
            prompt, choices = TEXTS[row["task"]]
            blank = "" if row["task"] == "ceval" else " "
            ids = [tokenizer.encode(blank + choice) for choice in choices]
            begin = tokenizer.encode(prompt)
        else:
            prompt, choices = TEXTS.get(row["task"], ("capital?", CHOICES[:3]))
            messages = CHAT["conversations"] if row["task"] == "chat" else turns(prompt)
            begin = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            ids = [tokenizer.encode(choice) for choice in choices]
        assert (row["prompt"], row["choices"]) == (prompt, choices)
        expected = [naive_logprob(weights, begin, part) for part in ids]
        assert row["logprobs"] == pytest.approx(expected, **TOLERANCE)
        per_byte = [x / len(c.encode()) for x, c in zip(expected, choices, strict=True)]
        assert row["choice"] == expected.index(max(expected))
        assert row["choice_norm"] == per_byte.index(max(per_byte))
        assert row["right"] == (row["choice"] == row["answer"])
        assert row["right_norm"] == (row["choice_norm"] == row["answer"])
    assert [row["answer"] for row in written] == [0, 1, 2, 1, 0][: len(rows)]


def test_a_model_that_knows_picks_what_it_knows(run, knowing, tmp_path):
    """Also beside rows of the other kinds, whose columns it has not."""
    replies = list(FACTS.values())
    rows = [
        {"task": "facts", "prompt": "who are you?", "choices": replies[:3], "answer": replies[1]},
        {"task": "facts", "prompt": "2+3", "choices": ["6", "5"], "answer": "B"},
        {"task": "facts", "prompt": "2+3", "choices": ["5", "7"], "answer": 1},
        {"task": "words", "conversations": turns("hi"), "answer": FACTS["hi"]},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = ok(run(knowing, "--eval_file", path, "--show_wrong", 9)).splitlines()
    assert lines[0].split() == ["task", "n", "right", "%", "95", "%", "CI", "norm", "%"]
    assert lines[1].split() == ["facts", "3", "2", "66.7", "20.8-93.9", "66.7"]
    assert lines[2].split() == ["words", "1", "1", "100.0", "20.7-100.0", "-"]
    assert lines[3].split() == ["total", "4", "3", "75.0", "30.1-95.4", "66.7"]
    assert lines[6] == "line 3 (facts)" and lines[8:10] == ['  choices ["5", "7"]', "  answer 1"]


def test_tables_of_published_sets(run, ignorant, tmp_path):
    names = "id,question,A,B,C,D,answer\r\n"
    ceval = tmp_path / "ceval.csv"
    ceval.write_bytes(b"\xef\xbb\xbf" + f'{names}0,"两行\n问题",1,2,3,4,D\r\n'.encode())
    mmlu = tmp_path / "mmlu.csv"
    mmlu.write_text('"What, then?",one,two,three,four,B\nHow?,1,2,3,4,A\n')
    named = tmp_path / "named.csv"
    named.write_text("question,A,B,C,D,answer\nHow?,1,2,3,4,A\n")
    answers = []
    for path in (ceval, mmlu, named):
        out = tmp_path / "out.jsonl"
        ok(run(ignorant, "--eval_file", path, "--eval_out", out))
        answers.append([(row["line"], row["answer"], row["prompt"]) for row in rows_of(out)])
    ask = "{}\nA. {}\nB. {}\nC. {}\nD. {}\n答案："
    assert answers[0] == [(2, 3, ask.format("两行\n问题", 1, 2, 3, 4))]
    assert [answer[:2] for answer in answers[1]] == [(1, 1), (2, 0)]
    english = ask.format("How?", 1, 2, 3, 4).replace("答案：", "Answer:")
    assert answers[1][1][2] == answers[2][0][2] == english


@pytest.mark.parametrize(
    "row, right",
    [
        (OURS | {"choices": ["B", "A"], "answer": "A"}, 1),  # its text
        (OURS | {"choices": ["x", "y"], "answer": "b"}, 1),
        (OURS | {"choices": ["2", "1"], "answer": "1"}, 1),
        (OURS | {"choices": ["x", "y"], "answer": "1"}, 1),
        (OURS | {"choices": [2, 1.5], "answer": "1.5"}, 1),
        (MMLU | {"choices": ["B", "A"], "answer": "A"}, 0),  # its letter
        (MMLU | {"choices": ["2", "1"], "answer": 1}, 1),
        (CEVAL | {"A": "C", "answer": "C"}, 2),
        (ARC | {"choices": {"text": ["B", "A"], "label": ["A", "B"]}, "answerKey": "A"}, 0),
    ],
)
def test_what_names_the_right_choice(row, right):
    assert read_choice_row(row).right == right


BAD = {
    "no answer": ({"prompt": "x", "choices": ["a", "b"]}, "'answer' must name the right choice"),
    "an answer beyond": (OURS | {"answer": 4}, "its number (0 to 3), found 4"),
    "an answer that is none": (OURS | {"answer": "London"}, "found 'London'"),
    "an answer that is a boolean": (OURS | {"answer": True}, "found True"),
    "one choice": (OURS | {"choices": ["a"]}, "2 to 26 texts, found 1"),
    "choices that are text": (OURS | {"choices": "ab"}, "2 to 26 texts, found a string"),
    "an empty choice": (OURS | {"choices": ["a", " "]}, "choice 2 is empty"),
    "a choice of half a character": (
        json.dumps(OURS | {"choices": ["a", "\ud800"]}), "lone surrogate"),
    "no question": ({"choices": ["a", "b"], "answer": 0}, "needs one of 'prompt', 'question'"),
    "two questions": (OURS | {"question": "y"}, "found: prompt, question"),
    "patterns, too": (OURS | {"accept": ["a"]}, "'choices' or 'accept', not both"),
    "labels that are too few": (ARC | {"choices": {"text": ["a", "b"], "label": ["1"]}}, "as many"),
    "no answerKey": (ARC | {"answerKey": "3"}, "'answerKey' must name"),
    "too long": (OURS | {"choices": ["a", "b " * 200]}, "the context of the model is 128"),
    "answered already": (
        {"conversations": turns("a", "b"), "choices": ["a", "b"], "answer": 0}, "the last turn"),
    "calls without tools": (
        {"conversations": turns("a"), "answer": {"tool_calls": [{"name": "f"}]}}, "no 'tools'"),
    "calls that are none": (
        {"conversations": turns("a"), "answer": {"tool_calls": []}}, "have 'tool_calls'"),
    "calls of what is not offered": (
        {"conversations": turns("a"), "answer": {"tool_calls": [{"name": "f"}]}, "tools": [
            {"type": "function", "function": {"name": "g", "parameters": {}}}]},
        "'answer' calls 'f', but 'tools' offers g"),
    "a task of several lines": (OURS | {"task": "a\n\x1b[2J"}, "must be one line of printable text"),
    "calls and words": (
        {"conversations": turns("a"), "answer": {"tool_calls": [{"name": "f"}], "content": "x"}},
        "without content"),
    "calls and more": ({"conversations": turns("a"), "answer": {"calls": 1}}, "'answer' has 'calls'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(run, ignorant, tmp_path, name):
    row, reason = BAD[name]
    path, out = write_jsonl(tmp_path / "rows.jsonl", [OURS, row]), tmp_path / "out.jsonl"
    message = error(run(ignorant, "--eval_file", path, "--eval_out", out))
    assert message.startswith(f"error: {path}:2: ") and reason in message
    assert not out.exists()


def test_what_is_no_raw_text_is_refused(run, ignorant, tmp_path):
    for row in (CHAT, {"conversations": turns("a"), "answer": "b"}):
        path = write_jsonl(tmp_path / "rows.jsonl", [row])
        assert "--raw 1" in error(run(ignorant, "--eval_file", path, "--raw", 1))
    assert "--raw 1: must" in error(run(ignorant, "--raw", 1))


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"question,A,B,C,D,answer\nq,1,2,3,4\n", ":2: has 5 fields, the first line 6"),
        (b'question,A,B,answer\nq,"1,2,A\n', ":2: broken CSV: unexpected end of data"),
        (b"question,A,B,answer\nq,caf\xe9,2,A\n", ":2: byte 0xe9 is not UTF-8"),
        (b"question,A,B,answer\n", ": no rows"),
        (b"", ": there is no text in it"),
        (b"a,b\n1,2\n", ":2: unknown schema, keys found: 'a', 'b'; accepted: 'conversations' with"),
        (b"2+2?,3,4,5,6,E\n", ":1: 'answer' must name the right choice"),
    ],
)
def test_bad_tables(run, ignorant, tmp_path, content, reason):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert error(run(ignorant, "--eval_file", path)).startswith(f"error: {path}{reason}")


# --------------------------------------------------------------------------------------------------
# Tool calls
# --------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
TOOLS = [TOOL, {"type": "function", "function": {"name": "rain", "parameters": {}}}]
CALLED = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}


@pytest.fixture(scope="module")
def calling(tmp_path_factory, tokenizer):
    """An out folder with a model that makes one call, whatever it is asked."""
    torch.manual_seed(0)
    shape = test_eval_model.SHAPE | {"max_seq_len": 256}
    model = MiniMindLM(LMConfig(vocab_size=len(tokenizer), **shape))
    said = [{"role": "user", "content": "Rome?"}]
    said.append({"role": "assistant", "content": "", "tool_calls": [CALLED]})
    ids, mask = ChatCoder(tokenizer).encode_chats([(said, TOOLS)])[0]
    x, at = torch.tensor([ids]), torch.tensor(mask)[1:].nonzero().squeeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        logits = model(x, logits_at=at).logits
        loss = torch.nn.functional.cross_entropy(logits, x[0, at + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    folder = tmp_path_factory.mktemp("calling")
    save(model, folder)
    return folder


def test_calls_are_compared_by_json_name_and_arguments(run, calling, tmp_path):
    def row(*calls, **more) -> dict:
        answer = {"tool_calls": list(calls), **more}
        return {"task": "t", "conversations": turns("Rome?"), "tools": TOOLS, "answer": answer}

    arguments = {"days": 2.0, "city": "Rome"}  # another order, and the same number
    rows = [
        row(CALLED, role="assistant", content=None),
        row({"function": {"name": "weather", "arguments": json.dumps(arguments)}, "id": "1"}),
        row({"name": "weather", "arguments": {"city": "Rome", "days": True}}),
        row({"name": "rain", "arguments": CALLED["arguments"]}),
        row(CALLED, CALLED),
    ]
    path, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    lines = ok(run(calling, "--eval_file", path, "--eval_out", out)).splitlines()
    assert lines[0].split("CI")[1].split() == ["json", "%", "name", "%", "args", "%"]
    assert lines[2].split() == ["total", "5", "2", "40.0", "11.8-76.9", "100.0", "60.0", "40.0"]
    keys = ("valid_json", "right_name", "right_arguments", "right")
    found = [[row[key] for key in keys] for row in rows_of(out)]
    yes = [True] * 4
    assert found == [yes, yes, [True, True, False, False]] + [[True, False, False, False]] * 2


# --------------------------------------------------------------------------------------------------
# Bits per byte
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [3, 80, 400], ids=["one window", "two", "many"])
def test_bits_per_byte_as_naively_window_by_window(
    run, ignorant, weights, tokenizer, tmp_path, words
):
    text = "".join(f"Wort {n}: é中 {n * n}\r\n" for n in range(words))
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    output = ok(run(ignorant, "--text_file", path))
    ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *tokenizer.encode(text)]
    nats, scored = 0.0, 1
    while scored < len(ids):  # a window of 128 tokens predicts the last 64, the first one all
        end = min(len(ids), 129 if scored == 1 else scored + 64)
        begin = max(0, end - 129)
        nats -= naive_logprob(weights, ids[begin:scored], ids[scored:end])
        scored = end
    bits = nats / math.log(2) / len(text.encode())
    assert output.startswith(f"{path}: {bits:.4f} bits per byte\n{len(text.encode()):,} bytes")
    assert f"{len(ids) - 1:,} tokens, {nats / (len(ids) - 1):.4f} nats per token" in output


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", ": there is no text in it"),
        (b"\xef\xbb\xbf \r\n", ": there is no text in it"),
        (b"ab\ncaf\xe9\n", ":2: byte 0xe9 is not UTF-8; convert the file"),
        ("text".encode("utf-16"), ": this is text in UTF-16: iconv"),
        (b"\1\2\0" * 99, ": this is binary data"),
        (b"\x1f\x8b\x08\0\0\0", ": this is compressed with gzip: gzip -dc"),
    ],
)
def test_files_that_are_no_text(run, ignorant, tmp_path, content, reason):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert error(run(ignorant, "--text_file", path)).startswith(f"error: {path}{reason}")
    assert "no such file" in error(run(ignorant, "--text_file", tmp_path / "none"))
    assert "not a file" in error(run(ignorant, "--text_file", tmp_path))
    assert "--text_file" in error(run(ignorant, "--text_file", path, "--prompt", "x"))


def test_wilson_intervals():
    """Of Brown, Cai and DasGupta's method, as statsmodels' proportion_confint gives them."""
    for right, n, low, high in (
        (0, 10, 0, 27.7533),
        (5, 10, 23.6593, 76.3407),
        (1, 1, 20.6549, 100),
    ):
        assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-3)
