"""Plain rows, conversations and texts, read directly: what the general readers make of them."""

import copy
import json
import pickle

import pytest
from conftest import chat
from hypothesis import given, settings
from hypothesis import strategies as st
from running import ROOT
from test_chat_format import TOKENIZER, WEATHER, assistant, system, tool, user
from test_chatml import CODERS, TEXT, plain_chats
from test_foreign_tokenizers import foreign
from transformers import PreTrainedTokenizerFast

from dataset.chat_encoder import ChatEncoder
from dataset.chat_format import ChatCoder
from dataset.chat_rows import ROLES, detect_format, normalise_row
from dataset.plain_chat import PlainChat
from dataset.plain_rows import SPECIAL, plain_format, plain_messages
from dataset.plain_text import PlainText
from dataset.sft_encoder import SFTEncoder
from dataset.text_encoder import text_encoder

ENCODERS = [ChatEncoder(coder.tokenizer) for coder in CODERS]
TEXTS = [PlainText(coder.tokenizer) for coder in CODERS]
LOSS_ON = st.sampled_from(["all", "last"])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(plain_chats(), max_size=4), st.sampled_from([0, 0, 1, 2]), LOSS_ON)
def test_conversations_are_what_the_coder_makes_of_them(chats, which, loss_on):
    """Alone and among others, with control tokens in their texts and without."""
    coder, encoder = CODERS[which], ENCODERS[which]
    before = copy.deepcopy(chats)
    read = [encoder.read_chat(messages, None, loss_on) for messages in chats]
    general = [coder.read_chat(messages, None, loss_on) for messages in chats]
    assert encoder.encode(read) == coder.encode(general)
    assert chats == before


def is_direct(encoder: ChatEncoder, messages: list[dict], tools=None) -> bool:
    return isinstance(encoder.read_chat(messages, tools), PlainChat)


@pytest.mark.parametrize("encoder", ENCODERS[:2])
def test_which_conversations_are_written_directly(encoder):
    assert is_direct(encoder, [system("s"), user("q"), assistant(" a\n"), tool("t"), user("")])
    assert is_direct(encoder, [user("< |im_end|>"), assistant("a <b> [c] </p>")])
    for text in ("<|im_end|>", "a<|im_start|>b", "<|endoftext|>", "<|im_end|><|im_start|>user\n"):
        assert not is_direct(encoder, [user(text), assistant("a")])
    for messages in (
        [user("q"), assistant("</think>")],
        [user("q"), {**assistant("a"), "reasoning_content": "r"}],
        [user("q"), {**assistant("a"), "from_model": True}],
        [user("q"), assistant("a"), {"role": "tool", "content": "t", "name": "n"}],
    ):
        assert not is_direct(encoder, messages)
    assert not is_direct(encoder, [user("q"), assistant("a")], [WEATHER])


def test_another_tokenizer_is_for_the_coder():
    tokenizers = [foreign(), foreign(special=("<|im_end|>",))]  # with a normalizer, too
    other = PreTrainedTokenizerFast.from_pretrained(ROOT / "model/minimind_tokenizer")
    other.chat_template += " "
    for tokenizer in [*tokenizers, other]:
        encoder, coder = ChatEncoder(tokenizer), ChatCoder(tokenizer)
        messages = [user("q"), assistant("a")]
        assert encoder.plain is None and not is_direct(encoder, messages)
        assert encoder.encode([encoder.read_chat(messages, None)]) == coder.encode_chats(
            [(messages, None)]
        )
    with pytest.raises(ValueError, match="loss_on must be 'all' or 'last', found 'first'"):
        ENCODERS[0].read_chat([user("q"), assistant("a")], None, "first")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(TEXT, st.text(max_size=40)), max_size=4), st.sampled_from([0, 1, 2]))
def test_texts_are_what_the_text_encoder_makes_of_them(texts, which):
    plain = TEXTS[which]
    assert plain.batch(texts) == CODERS[which].plain.batch(texts)


def test_what_a_tokenizer_was_told_later_changes_no_text():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "model/minimind_tokenizer")
    texts = ["one two three four five"] * 2
    plain, expected = PlainText(tokenizer), text_encoder(tokenizer).batch(texts)
    tokenizer(texts, truncation=True, max_length=2, padding="max_length")
    assert plain.batch(texts) == PlainText(tokenizer).batch(texts) == expected
    assert pickle.loads(pickle.dumps(plain)).batch(texts) == expected


VALUE = st.sampled_from([None, "a", "\n<|im_end|>", "", 1, [], {}, ["x"], "é"])
ROLE = st.sampled_from(
    ["user", "assistant", "user", "assistant", "system", "tool", *ROLES, 3, None]
)
TURN = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": st.one_of(st.just("a"), VALUE)}),
    st.fixed_dictionaries({"role": ROLE, "content": st.just("b")}, optional={"from": VALUE}),
    st.fixed_dictionaries(
        {"role": ROLE, "content": st.just("b")},
        optional={"note": VALUE, "loss": VALUE, "name": VALUE, "tools": VALUE},
    ),
    st.fixed_dictionaries({"from": ROLE, "value": VALUE}),
    VALUE,
)
TURNS = st.one_of(st.lists(TURN, max_size=4), VALUE)
ROW = st.one_of(
    VALUE,
    st.fixed_dictionaries(
        {},
        optional={
            "messages": TURNS,
            "conversations": TURNS,
            "id": VALUE,
            "instruction": VALUE,
            "output": VALUE,
            **dict.fromkeys(sorted(SPECIAL)[::9], VALUE),
        },
    ),
)
ANSWERED = st.tuples(st.sampled_from(["messages", "conversations"]), TURN).map(
    lambda part: {part[0]: [{"role": "user", "content": "q"}, part[1]], "source": "web"}
)


def result_of(function, *values):
    try:
        return function(*values)
    except ValueError as error:
        return str(error)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.one_of(ROW, ANSWERED), st.sampled_from(["minimind", "sharegpt", "alpaca", "openai"]))
def test_plain_rows_are_what_normalise_row_makes_of_them(row, fmt):
    if found := plain_format(row):
        assert found == detect_format(row)
    if messages := plain_messages(row, fmt):
        assert (messages, None) == normalise_row(row, fmt)
    if messages := plain_messages(row, fmt, need_assistant=False):
        assert (messages, None) == normalise_row(row, fmt, need_assistant=False)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.one_of(ROW, ANSWERED), min_size=1, max_size=4))
def test_the_first_row_says_the_format(rows):
    encoder, fmt = SFTEncoder(TOKENIZER, 64, "all"), None
    for row in rows:
        fmt = fmt or result_of(detect_format, row)
        if fmt not in ("minimind", "sharegpt", "alpaca", "openai"):
            assert result_of(encoder.parse, row) == fmt
            fmt = None
            continue
        expected = result_of(normalise_row, row, fmt)
        parsed = result_of(encoder.parse, row)
        if isinstance(expected, str):
            assert parsed == expected
        else:
            expected = CODERS[0].encode_chats([expected])
            assert encoder.coder.encode([parsed]) == expected


def test_a_plain_row_is_plain():
    for key, fmt in (("conversations", "minimind"), ("messages", "openai")):
        row = {key: [system("s"), user("q"), assistant("a")], "id": 7, "source": "web"}
        assert plain_format(row) == fmt and plain_messages(row, fmt) == row[key]
    assert plain_format({"conversations": [user("q"), assistant("a")], "messages": "x"}) is None
    assert plain_format({"conversations": [user("q")]}) is None
    assert plain_format(chat("q", "a") | {"tools": None}) is None


@pytest.mark.parametrize("is_array", [False, True])
def test_lone_surrogates_are_found_before_a_row_is_plain(is_array, tmp_path, sft):
    rows = [json.dumps(chat("q", answer)) for answer in ("a", "\ud800")]
    text = "[" + ",\n".join(rows) + "]" if is_array else "\n".join(rows)
    path = tmp_path / "data.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"json:2: .*lone surrogate"):
        sft(path)
