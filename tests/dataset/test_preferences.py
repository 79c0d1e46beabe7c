"""Preference pairs: the forms of rows, masks, packing, and what is wrong with a row."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from running import ROOT

from dataset.cached_dataset import describe
from dataset.chat_format import ChatCoder
from dataset.packing import batches, plan_epoch
from dataset.pair_rows import normalise_pair
from dataset.preference_dataset import PreferenceDataset, open_pairs, read_plain_pair
from dataset.preview import show_pairs
from runtime.reference import ReferencedPairs


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {side: [turn("user", prompt), turn("assistant", text)] for side, text in
            (("chosen", chosen), ("rejected", rejected))}  # fmt: skip


GOOD = pair("What is 2 + 2?", "It is 4.", "It is 5, I am sure.")


@pytest.fixture
def open_rows(tokenizer, tmp_path):
    def open_rows(rows, max_length=256, **options) -> PreferenceDataset:
        return PreferenceDataset(
            write_jsonl(tmp_path / "pairs.jsonl", rows),
            tokenizer,
            max_length,
            tmp_path / "cache",
            **options,
        )

    return open_rows


def sides(dataset, row=0):
    return [tuple(part.tolist() for part in side) for side in dataset[row]]


def test_a_pair_is_two_conversations_with_loss_on_the_answer(open_rows, tokenizer):
    dataset = open_rows([GOOD])
    for side, name in zip(dataset[0], ("chosen", "rejected"), strict=True):
        ids, mask = ChatCoder(tokenizer).encode_chats([(GOOD[name], None)], "last")[0]
        assert [part.tolist() for part in side] == [ids[:-1], ids[1:], mask[1:]]
        answer = tokenizer.decode(side[1][side[2].bool()].tolist())
        assert answer == GOOD[name][1]["content"] + "<|im_end|>"
    assert dataset.lengths.tolist() == [sum(len(side[0]) for side in dataset[0])]
    assert dataset.supervised.tolist() == [sum(int(side[2].sum()) for side in dataset[0])]
    assert (len(dataset), dataset.stats["rows"]) == (1, 1)


def test_only_the_last_answer_carries_loss(open_rows, tokenizer):
    before = [
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("assistant", "Hello!"),
        turn("user", "And now?"),
    ]
    dataset = open_rows(
        [
            {
                "chosen": [*before, turn("assistant", "Bye.")],
                "rejected": [*before, turn("assistant", "No")],
            }
        ]
    )
    X, Y, mask = dataset[0][0]
    assert tokenizer.decode(Y[mask.bool()].tolist()) == "Bye.<|im_end|>"


SHAREGPT = [{"from": "human", "value": "What is 2 + 2?"}]
FORMS = {
    "texts": {"prompt": "What is 2 + 2?", "chosen": "It is 4.", "rejected": "It is 5, I am sure."},
    "turns": {"prompt": GOOD["chosen"][:1], "chosen": GOOD["chosen"][1:], "rejected": GOOD["rejected"][1:]},
    "whole conversations beside the prompt": {"prompt": "What is 2 + 2?", **GOOD},
    "one turn each": {"prompt": GOOD["chosen"][:1], "chosen": GOOD["chosen"][1], "rejected": GOOD["rejected"][1]},
    "ShareGPT": {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "It is 4."},
                 "rejected": {"from": "gpt", "value": "It is 5, I am sure."}},
    "from and value in both": {"chosen": [*SHAREGPT, {"from": "gpt", "value": "It is 4."}],
                               "rejected": [*SHAREGPT, {"from": "gpt", "value": "It is 5, I am sure."}]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_rows_mean_the_same(open_rows, form):
    assert sides(open_rows([FORMS[form]])) == sides(open_rows([GOOD]))


ODD_TEXTS = ["a", "b", "", " ", "\u00e9", None, 3, ["a"]]  # half a character ends in `read_rows`
ODD_TURNS = [
    turn("user", "a"), turn("user", "b"), turn("human", "a"), turn("assistant", "a"),
    turn("assistant", "b"), turn("assistant", " "), turn("gpt", "b"), turn("system", "s"),
    turn("system", "s") | {"tools": [{"name": "f"}]}, turn("tool", "4"), turn("me", "a"),
    turn("assistant", "a") | {"weight": 0}, turn("assistant", "a") | {"weight": None},
    turn("assistant", "") | {"reasoning_content": "r"}, turn("user", ["a"]), "a", None, {},
    {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"role": "user"},
]  # fmt: skip
ODD_FIELDS = {"system": ["x", "", None], "weight": [0, 1], "margin": [2, None], "id": [7, None],
              "conversations": [SHAREGPT, None], "tools": ["[]"]}  # fmt: skip


def odd_pair(draw: random.Random) -> object:
    """A row of some form, mostly right, in which anything may be odd."""

    def part() -> object:
        if draw.random() < 0.4:
            return draw.choice(ODD_TEXTS[: draw.choice([2, 2, 2, 8])])
        turns = [draw.choice(ODD_TURNS) for _ in range(draw.choice([0, 1, 2, 3]))]
        return draw.choice([turns, turns, turns, draw.choice(ODD_TURNS), {}])

    row = {side: part() for side in ("prompt", "chosen", "rejected")}
    if draw.random() < 0.7:  # one conversation, which ends in two ways
        before = draw.choice([[turn("user", "a")], GOOD["chosen"] + [turn("user", "b")], part()])
        before = before if isinstance(before, list) else [before]
        row = {side: [*before, draw.choice(ODD_TURNS[3:7])] for side in ("chosen", "rejected")}
    if draw.random() < 0.2:
        name = draw.choice([*ODD_FIELDS])
        row[name] = draw.choice(ODD_FIELDS[name])
    if draw.random() < 0.1:
        row.pop(draw.choice([*row]))
    return row


def test_plain_pairs_are_read_as_all_others_are():
    """`read_plain_pair` says the same as `pair_rows`, or leaves the row to it."""
    draw, plain = random.Random(0), 0
    for row in (odd_pair(draw) for _ in range(40_000)):
        if sides := read_plain_pair(row):
            assert normalise_pair(row) == sides, row
            plain += 1
    assert 1_500 < plain < 30_000
    assert all(read_plain_pair(row) for row in (GOOD, FORMS["texts"]))
    assert not any(
        read_plain_pair(row) for row in ([1], None, {}, *(row for row, _ in BAD.values()))
    )


def test_real_data(tokenizer, shared_data, tmp_path):
    dataset = PreferenceDataset(shared_data / "dpo_en_demo.json", tokenizer, 8192, tmp_path)
    assert len(dataset) == 300 and dataset.stats["bad"] == dataset.stats["dropped"] == 0


BAD = {
    "there is no rejected": ({"chosen": GOOD["chosen"]}, "needs 'rejected'; keys found: 'chosen'"),
    "there is no chosen": ({"rejected": GOOD["chosen"]}, "needs 'chosen'"),
    "another schema": ({"instruction": "a", "output": "b"}, "needs 'chosen'; keys found: 'instruction', 'output'"),
    "no object": ([1], "must be a JSON object"),
    "equal answers": (pair("Hi", "Hello.", "Hello."), "the same answer"),
    "an empty answer": (pair("Hi", "Hello.", " "), "rejected: the answer is empty"),
    "an empty answer as text": ({"prompt": "Hi", "chosen": "", "rejected": "Go."}, "chosen: the answer is empty"),
    "null": ({"prompt": "Hi", "chosen": None, "rejected": "Go."}, "needs 'chosen'; keys found: 'prompt', 'rejected'"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
    "no turns": ({"chosen": [], "rejected": []}, "chosen: empty conversation"),
    "different prompts": (GOOD | {"rejected": pair("Who?", "a", "b")["rejected"]}, "answer different prompts"),
    "a user's last word": ({"chosen": GOOD["chosen"] + [turn("user", "?")], "rejected": GOOD["rejected"]},
                           "chosen: the last turn must be the assistant's"),
    "an unknown role": ({"chosen": [turn("me", "a")], "rejected": [turn("me", "b")]}, "chosen: turn 1: unknown role"),
    "a bad turn of the prompt": (FORMS["turns"] | {"system": "x", "prompt": [turn("user", "Hi"), turn("me", "a")]},
                                 "prompt: turn 2: unknown role 'me'"),
    "a bad turn of an answer": (FORMS["texts"] | {"system": "x", "rejected": [turn("me", "a")]},
                                "rejected: turn 1: unknown role 'me'"),
    "two system texts": (FORMS["turns"] | {"system": "x", "prompt": [turn("system", "y"), *GOOD["chosen"][:1]]},
                         "'system' and the system turn differ"),
    "images": (GOOD | {"images": ["a.png"]}, "'images' is not supported"),
    "a margin": (GOOD | {"margin": 2}, "'margin' is not supported"),
    "a weight": (GOOD | {"weight": 0.5}, "'weight' must be 0 or 1"),
    "another whole conversation": (GOOD | {"prompt": "Who?"}, "chosen: it begins with a user turn, so it is the whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(open_rows, case, tmp_path):
    row, reason = BAD[case]
    with pytest.raises(ValueError) as caught:
        open_rows([GOOD, row])
    assert str(caught.value).startswith(f"{tmp_path / 'pairs.jsonl'}:2: ") and reason in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    dataset = open_rows([GOOD, row, pair("Hi", "a", "b")], skip_bad=True)
    assert (len(dataset), dataset.stats["bad"]) == (
        2,
        1,
    ) and "1 bad rows skipped (first: line 2" in describe(dataset)


def test_pairs_that_cannot_be_learned_from_are_dropped(open_rows):
    """They stop nothing: a prompt that fills the context, a pair that says not to learn from it."""
    long, masked = pair("why " * 300, "Yes.", "No."), pair("Hi", "Yes.", "No.")
    masked["chosen"][1]["weight"] = 0
    dataset = open_rows([GOOD, long, pair("Hi", "a", "b"), GOOD | {"train": False}, masked])
    assert (len(dataset), dataset.stats["dropped"], dataset.stats["bad"]) == (2, 3, 0)
    assert "2 rows" in describe(dataset) and "3 dropped" in describe(dataset)
    with pytest.raises(
        ValueError, match="no usable row: 0 bad, 2 without a supervised token within max_seq_len"
    ):
        open_rows([long, long])


CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
TOLD = [turn("tool", "4"), turn("assistant", "It is 4.")]
CALLED = [*GOOD["chosen"][:1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TEXT_CALL, OLD_CALL = (
    json.dumps(CALL),
    {"role": "assistant", "content": None, "function_call": CALL},
)
SHARED_CALL = {"from": "function_call", "value": TEXT_CALL}
ROLES = {
    "tool_calls": {"chosen": CALLED, "rejected": GOOD["rejected"]},
    "function_call": FORMS["turns"] | {"chosen": turn("function_call", TEXT_CALL)},
    "a list of one": FORMS["texts"] | {"chosen": [turn("function_call", TEXT_CALL)]},
    "OpenAI's old field": FORMS["turns"] | {"chosen": OLD_CALL},
    "ShareGPT": FORMS["ShareGPT"] | {"chosen": SHARED_CALL},
    "under both names": FORMS["ShareGPT"] | {"chosen": SHARED_CALL, "rejected": GOOD["rejected"][1]},
    "null": FORMS["ShareGPT"] | dict.fromkeys(("prompt", "system", "tools", "messages", "label"))
    | {"chosen": SHARED_CALL | {"role": None, "weight": None}},
}  # fmt: skip


@pytest.mark.parametrize("form", ROLES)
def test_an_answer_may_be_a_call(open_rows, form):
    assert sides(open_rows([ROLES[form]])) == sides(open_rows([ROLES["tool_calls"]]))


def test_an_answer_may_follow_what_a_tool_said(open_rows, tokenizer):
    wrong = [TOLD[0], turn("assistant", "It is 5.")]
    whole = {"chosen": [*CALLED, *TOLD], "rejected": [*CALLED, *wrong]}
    tail = {"prompt": CALLED, "chosen": TOLD, "rejected": wrong}
    shares = {"conversations": [*SHAREGPT, {"from": "function_call", "value": json.dumps(CALL)}],
              "chosen": [{"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."}],
              "rejected": [{"from": "tool", "value": "4"}, {"from": "gpt", "value": "It is 5."}]}  # fmt: skip
    expected = sides(open_rows([whole]))
    assert sides(open_rows([tail])) == expected and sides(open_rows([shares])) == expected
    X, Y, mask = open_rows([tail])[0][0]
    assert tokenizer.decode(Y[mask.bool()].tolist()) == "It is 4.<|im_end|>"


def test_a_system_text_counts(open_rows, tokenizer):
    said = turn("system", "Be brief.")
    expected = sides(open_rows([{side: [said, *turns] for side, turns in GOOD.items()}]))
    for row in (GOOD, *FORMS.values(), FORMS["turns"] | {"prompt": [said, *GOOD["chosen"][:1]]}):
        assert sides(open_rows([row | {"system": "Be brief."}])) == expected
    # A prompt with it before whole conversations without it.
    assert sides(open_rows([GOOD | {"prompt": [said, *GOOD["chosen"][:1]]}])) == expected


def test_long_answers_are_cut_and_counted(open_rows):
    dataset = open_rows([pair("Hi", "yes " * 100, "no " * 100), GOOD], max_length=40)
    assert [len(side[0]) for side in dataset[0]] == [40, 40] and dataset.stats["truncated"] == 1


def test_pairs_that_cutting_makes_equal_are_dropped(open_rows):
    dataset = open_rows([pair("Hi", "yes " * 100 + "a", "yes " * 100 + "b"), GOOD], max_length=40)
    assert (len(dataset), dataset.stats["dropped"], dataset.stats["truncated"]) == (1, 1, 1)


def rows_of_all_lengths(count: int) -> list[dict]:
    return [
        pair(f"{n}?", "yes " * (1 + n * n % 19), "no " * (1 + n * 7 % 23) + ".")
        for n in range(count)
    ]


def test_collate_lays_the_sides_of_a_pair_side_by_side(open_rows):
    dataset = open_rows(rows_of_all_lengths(3))
    X, Y, mask, lens = dataset.collate([dataset[row] for row in (2, 0)])
    flat = [side for row in (2, 0) for side in dataset[row]]
    assert lens == [len(side[0]) for side in flat] and X.shape == (1, sum(lens))
    for n, tensor in enumerate((X, Y, mask)):
        assert torch.equal(tensor[0], torch.cat([side[n] for side in flat]))
    X, _, mask, lens = dataset.collate([])
    assert (X.shape, mask.sum(), lens) == ((1, 1), 0, [])


@pytest.mark.parametrize("packing", [0, 1])
def test_every_pair_is_in_the_epoch_once_and_whole(open_rows, packing):
    """Also where two sides together are longer than a row may be."""
    dataset = open_rows(
        [*rows_of_all_lengths(40), pair("Hi", "yes " * 60, "no " * 60)], max_length=64
    )
    assert dataset.lengths.max() > 64
    plan = plan_epoch(dataset, np.arange(41), 1, 64, packing, 4, 0, 0)
    seen, pairs = [], 0
    for rank in range(3):
        for _, _, mask, lens in batches(dataset, plan, range(plan.steps), rank, 3, 2, 0):
            assert len(lens) % 2 == 0
            seen += mask[0].split([*lens, mask.size(1) - sum(lens)])[:-1]
    for step in range(plan.steps):
        pairs += plan.size(step)
        rows = [plan.documents(row) for row in plan.window(step)]
        assert all(dataset.lengths[row].sum() <= 64 or len(row) == 1 for row in rows)
    assert (
        pairs == 41
        and sum(int(mask.sum()) for mask in seen) == dataset.supervised.sum()
        and len(seen) == 82
    )


def test_reference_values_come_with_their_pairs(open_rows):
    dataset = open_rows(rows_of_all_lengths(5))
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    with_values = ReferencedPairs(dataset, values)
    *batch, found = with_values.collate([with_values[row] for row in (3, 1)])
    assert (
        found.tolist() == [[6, 7], [2, 3]]
        and batch[3] == dataset.collate([dataset[3], dataset[1]])[3]
    )
    assert with_values.collate([])[4].shape == (0, 2)


def test_held_out_pairs(tokenizer, tmp_path):
    flags = {
        "data_path": write_jsonl(tmp_path / "a.jsonl", rows_of_all_lengths(10)),
        "max_seq_len": 64,
        "seed": 1,
    }
    flags |= {
        "cache_dir": tmp_path,
        "skip_bad": False,
        "curriculum": "none",
        "eval_ratio": 0.2,
        "eval_data": None,
    }
    pairs, rows, others, held_out = open_pairs(flags, tokenizer)
    assert others is pairs and sorted([*rows, *held_out]) == [*range(10)] and len(held_out) == 2
    flags |= {"eval_data": write_jsonl(tmp_path / "b.jsonl", [GOOD])}
    with pytest.raises(ValueError, match="--eval_data .* and --eval_ratio 0.2: use one of the two"):
        open_pairs(flags, tokenizer)
    pairs, rows, others, held_out = open_pairs(flags | {"eval_ratio": 0.0}, tokenizer)
    assert (len(pairs), len(rows), len(others), [*held_out]) == (10, 10, 1, [0])


def test_preview(open_rows, tokenizer):
    dataset = open_rows([GOOD])
    shown = show_pairs(dataset, tokenizer, 3, False) + f"--- {describe(dataset)}"
    for text in (
        "pair 0, chosen",
        "[[It is 4.<|im_end|>]]",
        "pair 0, rejected",
        "[[It is 5, I am sure.<|im_end|>]]",
    ):
        assert text in shown
    assert shown.splitlines()[-1].startswith("--- 1 rows, ") and shown.count("What is 2 + 2?") == 2


LOADED = """
import sys
from dataset.preference_dataset import PreferenceDataset
from dataset.tokenizer import load_tokenizer

path, cache = sys.argv[1:]
PreferenceDataset(path, load_tokenizer("model/minimind_tokenizer"), cache_dir=cache)
print(*(name for name in sys.modules if name.startswith("dataset.")))
"""


@pytest.mark.parametrize("form", ["texts", "turns"])
def test_plain_pairs_load_no_other_reader(form, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD, FORMS[form]])
    command = [sys.executable, "-c", LOADED, str(path), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("dataset.") for name in done.stdout.split()}
    assert ("pair_rows" in loaded) == ("row_fields" in loaded) == (form == "turns")
