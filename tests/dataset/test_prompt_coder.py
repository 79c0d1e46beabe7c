"""Prompts and replies, read and written directly: what the `ChatCoder` makes of them."""

import copy
import random
import subprocess
import sys

import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT
from test_chat_format import WEATHER, assistant, system, tool, user
from test_chatml import CODERS, plain_chats
from test_foreign_tokenizers import foreign
from transformers import PreTrainedTokenizerFast

from dataset.chat_format import ChatCoder
from dataset.prompt_coder import PromptCoder

PROMPT_CODERS = [PromptCoder(coder.tokenizer) for coder in CODERS]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(plain_chats(), st.sampled_from([0, 0, 1, 2]))
def test_prompts_are_what_the_coder_makes_of_them(messages, which):
    """Texts of any kind, with control tokens in them and without."""
    before = copy.deepcopy(messages)
    assert PROMPT_CODERS[which].encode_prompt(messages) == CODERS[which].encode_prompt(messages)
    assert messages == before


@pytest.mark.parametrize("which", [0, 1, 2])
def test_replies_are_decoded_as_the_coder_does(which):
    direct, coder, draw = PROMPT_CODERS[which], CODERS[which], random.Random(which)
    assert (direct.ends, direct.end_of_turn) == (coder.ends, coder.end_of_turn)
    special = [*coder.plain.ids.values(), coder.end_of_turn, coder.tokenizer.pad_token_id]
    for _ in range(500):
        ids = [
            draw.choice(special) if draw.random() < 0.2 else draw.randrange(len(coder.tokenizer))
            for _ in range(draw.randrange(12))
        ]
        assert direct.decode_reply(ids) == coder.decode_reply(ids)


@pytest.mark.parametrize("coder", CODERS[:2])
def test_which_prompts_are_written_directly(coder):
    def is_direct(messages: list[dict], tools=None) -> bool:
        encoder = PromptCoder(coder.tokenizer)
        encoder.encode_prompt(messages, tools)
        return "general" not in vars(encoder)

    assert is_direct([system("s"), user("q"), assistant(" a\n"), tool("t"), user("")])
    assert is_direct([user("< |im_end|> <b> [c] </p>")])
    for text in ("<|im_end|>", "a<|im_start|>b", "<|endoftext|>", "</think>"):
        assert not is_direct([user(text)])
    assert not is_direct([user("q"), {**assistant("a"), "from_model": True}, user("q")])
    assert not is_direct([user("q")], [WEATHER])


def test_another_tokenizer_is_for_the_coder():
    other = PreTrainedTokenizerFast.from_pretrained(ROOT / "model/minimind_tokenizer")
    other.chat_template += " "
    for tokenizer in (foreign(), foreign(special=("<|im_end|>",)), other):
        encoder, coder = PromptCoder(tokenizer), ChatCoder(tokenizer)
        assert not encoder.is_ours and encoder.ends == coder.ends
        assert encoder.encode_prompt([user("q")]) == coder.encode_prompt([user("q")])
    other.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        PromptCoder(other)


LOADED = """
import sys
from dataset.prompt_dataset import PromptDataset
from dataset.tokenizer import load_tokenizer

PromptDataset(sys.argv[1], load_tokenizer("model/minimind_tokenizer"), 64, 8)
print(*(name for name in sys.modules if name.startswith("dataset.")))
"""


@pytest.mark.parametrize("text", ["a", "a <|im_end|>"])
def test_the_coder_is_loaded_for_prompts_that_need_it(text, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": [user(text)], "answer": "4"}])
    command = [sys.executable, "-c", LOADED, str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("dataset.chat_format" in done.stdout.split()) is (text != "a")
