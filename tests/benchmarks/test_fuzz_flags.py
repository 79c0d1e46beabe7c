"""Odd values of flags: some hundred of benchmarks/fuzz_flags.py, and what it finds in more than a
moment."""

import json
import math

import pytest
from conftest import write_jsonl
from running import run_script

from dataset.prompt_dataset import PromptDataset
from dataset.read_rows import read_rows
from runtime import flags
from runtime.process import odd_flags


def test_odd_values_make_a_run_or_one_line():
    done = run_script("benchmarks/fuzz_flags.py", "--cases", 100, "--limit", 100, timeout=280)
    assert done.returncode == 0 and " 0 faults" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "script, flag",
    [
        ("trainer/engines/train_sft_deepspeed.py", "--deepspeed_config=--"),
        ("scripts/check_copies.py", "--root=a\nb"),
    ],
)
def test_what_it_has_found_is_told_in_one_line(script, flag):
    done = run_script(script, flag)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "given, said",
    [
        ({"temperature": 1e-300}, "--temperature 1e-300: must be 0.001 or more"),
        ({"learning_rate": float("nan")}, "--learning_rate nan: must be a finite number"),
        ({"gamma": 1.5}, "--gamma 1.5: must be at most 1"),
        ({"seed": 2**80}, "--seed 1208925819614629174706176: must be at most"),
        ({"batch_size": 0}, "--batch_size 0: must be positive"),
        ({"max_steps": -1}, "--max_steps -1: must be 0 or more"),
        ({"resume": []}, "--resume --: must have a value"),
        ({"data_path": "a\0b"}, r"--data_path 'a\\x00b': has a character that no text may hold"),
        ({"reward": ["exact", "\ud83d"]}, r"--reward '\\ud83d': has a character that no text"),
        ({"save_weight": "a/b"}, "--save_weight 'a/b': must be a file's name"),
        ({"save_weight": "a\nb"}, r"--save_weight 'a\\nb': must be a file's name"),
        ({"save_weight": "\U0001f600" * 51}, "has 204 bytes, a file's name may have 200"),
    ],
)
def test_what_no_run_could_have_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        flags.check_flags(given)


def test_names_in_any_language_and_encoding_are_fine():
    for name in ("full_sft", "\u4f60\u597d \U0001f600", "caf\udce9", ".hidden", "a b"):
        flags.check_flags({"save_weight": name})


TEXTS = [
    "",
    ".",
    "..",
    "a",
    "a/b",
    "a b",
    ".a",
    "a\0",
    "a\n",
    "\ud83d",
    "caf\udce9",
    "\u4f60\u597d",
]
TEXTS += ["x" * n for n in (40, 41, 200, 201)] + ["\U0001f600" * n for n in (40, 50, 51)]
TEXTS += ["auto", "cpu", "mps", "mps:0", "cuda", "cuda:1", "cuda:12345", "gpu"]
TEXTS += ["none", "length", "field:x", "field:"]


@pytest.mark.parametrize("name", ["device", "curriculum", "save_weight", "data_path", "report_to"])
def test_what_is_fine_at_first_sight_is_fine_at_a_close_look(name):
    """Most values are never looked at closely: that must not let a wrong one pass."""
    values = TEXTS if name != "report_to" else [[], [[]], ["a", 1], *([text] for text in TEXTS)]
    ordinary = [value for value in values if flags.is_ordinary(name, value)]
    for value in ordinary:
        if value != []:
            odd_flags.check_value(name, value, *flags.FINITE)
    assert 0 < len(ordinary) < len(values)


def test_numbers_are_those_of_their_bounds():
    for name, (least, most) in flags.BOUNDS.items():
        for value in (least, most, (least + most) / 2):
            flags.check_flags({name: value})
        for value in (math.nextafter(least, -math.inf), math.nextafter(most, math.inf)):
            with pytest.raises(ValueError, match=f"^--{name} "):
                flags.check_flags({name: value})
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=f"^--{name} {value}: must be a finite number"):
                flags.check_flags({name: value})


HALF = "half \ud83d"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = {
    "text": {"text": HALF},
    "conversations": {"conversations": [TURNS[0], {"role": "assistant", "content": HALF}]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": HALF}, {"from": "gpt", "value": "b"}]
    },
    "Alpaca": {"instruction": "a", "input": HALF, "output": "b"},
    "messages": {"messages": [{"role": "user", "content": HALF}, TURNS[1]]},
    "name of a tool": {"messages": TURNS, "tools": [{"name": HALF}]},
    "pair": {"prompt": "a", "chosen": "b", "rejected": HALF},
    "answer": {"messages": TURNS[:1], "answer": HALF},
    "accept": {"task": "t", "conversations": TURNS[:1], "accept": [HALF]},
    "a field of a reward": {"messages": TURNS[:1], "answer": "b", "grade": {"text": HALF}},
    "a key": {"messages": TURNS, HALF: 1},
    "no object": HALF,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_half_a_character_is_a_fault_of_the_row(tmp_path, name, array):
    """In every field of every format, also one that nobody knows: a reward may print it, a tracker
    write it."""
    good, bad = json.dumps({"text": "\U0001f600 \\ud83d"}), json.dumps(ROWS[name])
    path = tmp_path / "data.json"
    path.write_text(f"[{good},\n{bad}]" if array else f"{good}\n{bad}\n")
    rows = [row for row, _ in read_rows(path)]
    assert [fault for _, _, fault in rows] == ["", rows[1][2]] and rows[1][0] == 2
    assert r"a lone surrogate \ud83d in it" in rows[1][2]


def test_half_a_character_in_an_answer_is_told_with_its_line(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "prompts.jsonl", [json.dumps(ROWS["answer"])])
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: a lone surrogate \\ud83d"):
        PromptDataset(path, tokenizer, 64, 8, False)
