"""Our template written directly: what the reader of all templates and apply_chat_template give."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import chat, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_format import CHATS, SPELLINGS, TOKENIZER, WEATHER, assistant, injections, user
from test_foreign_tokenizers import foreign
from transformers import PreTrainedTokenizerFast

from benchmarks.chat_templates import CHATML, case_tokenizer
from dataset.chat_format import ChatCoder
from dataset.chat_template import CHAT_TEMPLATE
from dataset.our_template import ROLES, TEMPLATE_SHA256

ROOT = Path(__file__).resolve().parents[2]
# Ours; one that merges newlines, as Qwen's does; one without tokens for thinking.
CODERS = [ChatCoder(tokenizer) for tokenizer in (TOKENIZER, case_tokenizer("ours"), foreign())]
EDGES = ["\n", "\n\n", "\r\n", " ", "\t", "a", "12", "你好", "。", "e\u0301", "😀", "\u2028", "\0"]
TEXT = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(EDGES), max_size=8).map("".join),
    st.lists(st.sampled_from([*SPELLINGS, *EDGES]), max_size=6).map("".join),
    st.sampled_from(injections()),
)


@st.composite
def plain_chats(draw):
    """Roles in any order, texts of any kind; a system turn that is not the first one, too."""
    messages = []
    for role in draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7)):
        message = {"role": role, "content": draw(TEXT).replace("</think>", "")}
        if role == "assistant" and draw(st.booleans()):
            message["loss"] = draw(st.booleans())
        messages.append(message)
    return messages


def by_the_reader(coder: ChatCoder) -> ChatCoder:
    """The same coder, without the direct form."""
    other = ChatCoder.__new__(ChatCoder)
    vars(other).update(vars(coder) | {"chatml": None})
    return other


READERS = [by_the_reader(coder) for coder in CODERS]


@settings(max_examples=2500, deadline=None, derandomize=True, database=None)
@given(plain_chats(), st.sampled_from([0, 0, 1, 2]), st.sampled_from(["all", "last"]))
def test_plain_chats_are_what_the_reader_makes_of_them(messages, which, loss_on):
    coder, reader = CODERS[which], READERS[which]
    assert coder.chatml.can_write(messages, None)
    written = coder.read_chat(messages, None, loss_on)
    assert written == reader.read_chat(messages, None, loss_on)
    ids, mask = coder.encode([written])[0]
    assert (ids, mask) == reader.encode([written])[0]
    prompts = [messages, messages[:-1]]
    for prompt in prompts:
        for thinking in (None, False, True):
            text = coder.prompt_text(prompt, None, thinking)
            assert text == reader.prompt_text(prompt, None, thinking)
    if not re.search(r"<\|im_|<\|end|<\|res|think>|tool_call>", json.dumps(messages)):
        apply = coder.tokenizer.apply_chat_template
        assert ids == apply(messages, return_dict=False)
        flags = {"add_generation_prompt": True, "enable_thinking": True, "return_dict": False}
        assert coder.encode_prompt(messages, None, True) == apply(messages, **flags)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(plain_chats(), st.sampled_from([0, 1, 2]))
def test_what_a_model_wrote_is_what_the_reader_makes_of_it(messages, which):
    """Its control tokens are control tokens again, thinking included."""
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = "<think>\na\n</think>\n\n" + message["content"]
            message["from_model"] = True
    assert CODERS[which].chatml.can_write(messages, None)
    text = CODERS[which].prompt_text(messages)
    assert text == READERS[which].prompt_text(messages)


@pytest.mark.parametrize("chat", CHATS)
def test_the_reader_alone_gives_the_same_for_all_other_chats(chat):
    coder, reader = CODERS[0], READERS[0]
    assert coder.encode_chats([chat]) == reader.encode_chats([chat])
    for thinking in (None, True):
        prompt = coder.encode_prompt(*chat, thinking)
        assert prompt == reader.encode_prompt(*chat, thinking)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_a_coder_knows_of_the_template_is_what_the_reader_finds(which):
    coder = CODERS[which]
    general, tools = coder.readers
    assert general is tools
    assert general.manner.heads == ["<|im_start|>assistant\n"]
    assert coder.ends == [coder.plain.ids[token] for token in general.manner.ends]
    for thinking in (None, False, True):
        assert coder.opening(thinking) == general.template.opening(thinking)


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([user("q"), assistant("a")], [WEATHER]),
        ([user("q"), assistant("a", reasoning_content="t")], None),
        ([user("q"), assistant("a", tool_calls=[])], None),
        ([user("q"), assistant("<think>\nt\n</think>\n\na")], None),
        ([user("q"), assistant("</think>")], None),
        ([user("q </think>"), assistant("a")], None),
        ([user("q"), assistant(None)], None),
        ([user("q"), {"role": "assistant"}], None),
        ([{**user("q"), "name": "n"}], None),
        ([{"role": "critic", "content": "c"}], None),
    ],
)
def test_more_than_roles_and_texts_is_for_the_reader(messages, tools):
    assert not CODERS[0].chatml.can_write(messages, tools)


def test_the_template_is_known_by_its_hash():
    """Whoever changes it has to look at `chatml.py` and `plain_turns.py` as well."""
    path = ROOT / "model/minimind_tokenizer/chat_template.jinja"
    for template in (CHAT_TEMPLATE, path.read_text(encoding="utf-8"), TOKENIZER.chat_template):
        assert hashlib.sha256(template.encode()).hexdigest() == TEMPLATE_SHA256


def test_another_template_is_never_written_directly():
    for template in (CHATML, CHAT_TEMPLATE + " ", {"default": CHAT_TEMPLATE}):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "model/minimind_tokenizer")
        tokenizer.chat_template = template
        coder = ChatCoder(tokenizer)
        assert coder.chatml is None
        messages = [user("a"), assistant("b")]
        assert coder.encode_chats([(messages, None)]) == CODERS[0].encode_chats([(messages, None)])


def test_a_tokenizer_with_other_tokens_is_never_written_directly(monkeypatch):
    assert ChatCoder(foreign(special=("<|im_end|>",))).chatml is None
    assert ChatCoder(foreign(special=("<|im_start|>", "<|im_end|>", "<|im_end|>\n"))).chatml is None
    tokenizer = foreign()
    original = PreTrainedTokenizerFast.apply_chat_template

    def other(self, messages, **options):
        return [*original(self, messages, **options), 7]

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", other)
    with pytest.raises(ValueError, match=r"token \d+ of a conversation of 2 turns is .*gives"):
        ChatCoder(tokenizer)


LOADED = """
import sys
from dataset.lm_dataset import SFTDataset, load_tokenizer

tokenizer, (path, cache) = load_tokenizer("model/minimind_tokenizer"), sys.argv[1:]
SFTDataset(path, tokenizer, cache_dir=cache)
print(*(name for name in sys.modules if name.startswith("dataset.")))
"""


@pytest.mark.parametrize("is_plain", [True, False])
def test_the_reader_is_loaded_for_rows_that_need_it(is_plain, tmp_path):
    rows = [chat("a", "\n\nb"), chat("a", "b" if is_plain else "<think>\nt\n</think>\n\nb")]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    command = [sys.executable, "-c", LOADED, str(data), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("dataset.") for name in done.stdout.split()}
    assert ("chatml" in loaded) is not is_plain and "character_masks" not in loaded
    assert any(name.startswith("template_") for name in loaded) is not is_plain
