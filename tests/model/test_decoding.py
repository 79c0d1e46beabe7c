"""What a model wrote, as text: all of it, whatever a tokenizer calls special."""

import json
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import write_jsonl
from running import ROOT
from test_foreign_tokenizers import foreign
from transformers import AutoTokenizer

from dataset.chat_format import ChatCoder
from dataset.prompt_dataset import PromptDataset
from dataset.replies import final_answer
from model.lm import LMConfig
from runtime.rl import rewards, rollout
from runtime.rl.sampler import show_samples

CALL = {"name": "weather", "arguments": {"city": "北京"}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
THOUGHT = "<think>\n6x7\n</think>\n\n42"
MESSAGE = {"role": "assistant", "content": "42", "reasoning_content": "6x7", "tool_calls": [CALL]}


@pytest.fixture(scope="module", params=["ours", "older", "foreign"])
def any_tokenizer(request, tmp_path_factory):
    """Ours; ours as it was, all of whose added tokens are special; one like Qwen's."""
    if request.param == "foreign":
        tokenizer = foreign()
        tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
        return tokenizer
    folder = ROOT / "model" / "minimind_tokenizer"
    if request.param == "older":
        folder = shutil.copytree(folder, tmp_path_factory.mktemp("older") / "tokenizer")
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for token in content["added_tokens"]:
            token["special"] = True
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def written(message: dict, tokenizer) -> list[int]:
    """The ids that a model writes for an assistant turn, its end-of-turn token the last."""
    chat = [{"role": "user", "content": "x"}, message]
    ids, mask = ChatCoder(tokenizer).encode_chats([(chat, None)])[0]
    return [i for i, m in zip(ids, mask, strict=True) if m]


def test_only_padding_and_the_end_of_turn_are_left_out(any_tokenizer):
    tokenizer = any_tokenizer
    ids, text = written(MESSAGE, tokenizer), f"{THOUGHT}\n{CALLED}"
    pad, start = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_start|>")
    )
    assert (
        ChatCoder(tokenizer).decode_reply(ids)
        == ChatCoder(tokenizer).decode_reply(ids[:-1])
        == text
    )
    assert ChatCoder(tokenizer).decode_reply([pad, *ids, pad, *ids]) == text
    assert ChatCoder(tokenizer).decode_reply([*ids[:-1], pad, pad]) == text
    assert ChatCoder(tokenizer).decode_reply([start, *ids]) == "<|im_start|>" + text
    assert ChatCoder(tokenizer).decode_reply([]) == ""


def test_spaces_are_those_that_were_written(any_tokenizer):
    ids = written({"role": "assistant", "content": " a , b . do n't \n"}, any_tokenizer)
    assert ChatCoder(any_tokenizer).decode_reply(ids) == " a , b . do n't \n"


def test_other_programs_keep_the_markers(tokenizer):
    """`skip_special_tokens=True` is what they decode replies with."""
    assert (
        tokenizer.decode(written(MESSAGE, tokenizer), skip_special_tokens=True)
        == f"{THOUGHT}\n{CALLED}"
    )


# --------------------------------------------------------------------------------------------------
# Rewards
# --------------------------------------------------------------------------------------------------


def rollout_of(completions: list[list[int]]) -> rollout.Rollout:
    n = len(completions)
    return rollout.Rollout([[9, 9]] * n, completions, [True] * n)


def test_rewards_see_what_the_model_wrote(any_tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def calls(prompts, completions, rows):\n    return [text.count('<tool_call>') for text in"
        " completions]\n"
    )
    words = ["exact", "format", f"{tmp_path}/mine.py:calls"]
    functions = rewards.load_rewards(words, LMConfig(), Namespace())
    coder = ChatCoder(any_tokenizer)
    thinking = {"role": "assistant", "content": "42", "reasoning_content": "6x7"}
    messages = [thinking, {"role": "assistant", "content": "42"}, {**MESSAGE, "content": "41"}]
    sampled = rollout_of([written(message, any_tokenizer) for message in messages])
    rows, places = [{"answer": "42"}] * 3, ["data:1", "data:2", "data:3"]
    assert rewards.compute_rewards(functions, sampled, rows, places, coder).tolist() == [
        [1, 1, 0],
        [1, 0, 0],
        [0, 1, 1],
    ]
    assert repr(THOUGHT) in show_samples(sampled, torch.zeros(3, 3), coder)


# --------------------------------------------------------------------------------------------------
# Reference answers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("42", "42"),
        (" 42\n", "42"),
        (THOUGHT, "42"),
        ("6x7\n</think>\n\n42", "42"),  # <think> stands in the prompt
        ("<think>a</think>42", "42"),
        ("<think>\n\n</think>\n\n42 ", "42"),
        ("<think>\n42", "<think>\n42"),  # cut off while it thought: that is no answer
        (THOUGHT + "\n" + CALLED, "42\n" + CALLED),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_reply_and_reference_are_compared_alike():
    references = ["42", " 42 ", THOUGHT, "<think>\nby heart\n</think>\n\n42"]
    for reply in ("42", THOUGHT, "<think>\nelse\n</think>\n\n42\n"):
        assert rewards.exact(
            [""] * 4, [reply] * 4, [{"answer": answer} for answer in references]
        ) == [1, 1, 1, 1]
    assert rewards.exact([""], ["<think>\n42\n</think>\n\n41"], [{"answer": THOUGHT}]) == [0]


def test_the_last_turn_of_a_row_is_its_answer_without_the_thinking(tokenizer, tmp_path):
    ask = {"role": "user", "content": "6x7"}
    replies = [
        {"role": "assistant", "content": "42"},
        {"role": "assistant", "content": THOUGHT},
        {"role": "assistant", "content": "42", "reasoning_content": "6x7"},
        {"role": "assistant", "content": "<think>6x7</think> 42"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "look", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "assistant", "content": "<think>\nonly thoughts\n</think>\n\n"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [ask, reply]} for reply in replies])
    dataset = PromptDataset(path, tokenizer, 64, 16)
    answers = [row.get("answer") for row in dataset.rows]
    assert answers == ["42", "42", "42", "42", CALLED, "look\n" + CALLED, None]
    # Whoever says the reference is right.
    for reply, row in zip(replies[:-1], dataset.rows, strict=False):
        assert rewards.exact(
            [""], [ChatCoder(tokenizer).decode_reply(written(reply, tokenizer))], [row]
        ) == [1]
