"""The chat layout on other tokenizers: their added tokens stay out of reach."""

import pickle

import pytest
from test_chat_format import (
    CALL,
    CODE,
    TOKENIZER,
    WEATHER,
    assistant,
    attacked,
    body_of,
    encode_chat,
    injections,
    user,
)
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dataset.chat_format import ChatCoder
from dataset.chat_template import CHAT_TEMPLATE
from dataset.text_encoder import text_encoder


def foreign(
    special=("<|im_start|>", "<|im_end|>"),
    plain=("<think>", "</think>", "<tool_call>", "</tool_call>"),
):
    """A tokenizer like Qwen's: NFC, joined newlines, tool and thinking tokens not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["user assistant system tool\n\nthink <tool_call> |im_end|>\n"] * 9, trainer
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)


ORDINARY = (
    [
        user("hello there\n\nyou"),
        assistant("tool think", reasoning_content="system", tool_calls=[CALL]),
    ],
    None,
)


def test_foreign_tokenizer_equals_its_template_on_ordinary_text():
    tokenizer = foreign()
    ids, mask = encode_chat(*ORDINARY, ChatCoder(tokenizer))
    assert ids == tokenizer.apply_chat_template(ORDINARY[0], return_dict=False)
    answer = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert answer == body_of(ORDINARY[0][1]) + "<|im_end|>"


@pytest.mark.parametrize("text", injections()[::4])
def test_foreign_added_tokens_are_out_of_reach_even_if_not_special(text):
    tokenizer = foreign()
    coder, added = ChatCoder(tokenizer), set(tokenizer.get_added_vocab().values())
    assert added.isdisjoint(coder.plain(text))
    counts = [
        sum(i in added for i in encode_chat(*attacked(t), coder)[0]) for t in (text, "HARMLESS")
    ]
    assert counts[0] == counts[1]


def test_markers_that_are_no_tokens_become_text():
    tokenizer = foreign(plain=())
    ids, mask = encode_chat(*ORDINARY, ChatCoder(tokenizer))
    assert ids == tokenizer.apply_chat_template(ORDINARY[0], return_dict=False)
    assert (
        tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
        == body_of(ORDINARY[0][1]) + "<|im_end|>"
    )
    messages = [user("x"), assistant("<tool_call>")]
    ids, _ = encode_chat(messages, [WEATHER], ChatCoder(tokenizer))
    assert ids == tokenizer.apply_chat_template(messages, tools=[WEATHER], return_dict=False)


def test_a_turn_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="no token ends an assistant turn: behind it stands '<"):
        ChatCoder(foreign(special=("<|im_start|>",)))


def test_a_header_need_be_no_token():
    tokenizer = foreign(special=("<|im_end|>",))
    ids, mask = encode_chat(*ORDINARY, ChatCoder(tokenizer))
    assert ids == tokenizer.apply_chat_template(ORDINARY[0], return_dict=False)
    answer = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert answer == body_of(ORDINARY[0][1]) + "<|im_end|>"


def test_control_tokens_that_the_bpe_could_merge_are_cut_out():
    """A vocabulary trained on text that spells tokens which later are control tokens."""
    spellings = ["<|im_start|>", "<|im_end|>", "<think>"]
    for ignore_merges in (False, True):  # True: a piece that is an entry is taken whole
        trap = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        trap.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(" ", "removed"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trap.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, show_progress=False
        )
        trap.train_from_iterator(["<|im_start|> <|im_end|> <think> <think>s"] * 9, trainer)
        # The trap is armed.
        assert trap.encode("<|im_end|>").ids == [trap.token_to_id("<|im_end|>")]
        trap.add_special_tokens(spellings)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=trap, chat_template=CHAT_TEMPLATE)
        coder, added = ChatCoder(tokenizer), set(tokenizer.get_added_vocab().values())
        assert len(added) == 3
        for text in [
            *spellings,
            *(f"x{t}{t}y" for t in spellings),
            "<think>s",
            " ".join(spellings),
        ]:
            assert added.isdisjoint(coder.plain(text))
            assert tokenizer.decode(coder.plain(text)) == text.replace(" ", "")


def test_tokenizers_that_are_no_bpe_are_refused():
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    with pytest.raises(ValueError, match="only fast BPE tokenizers are supported"):
        text_encoder(words)


def test_plain_encoder_equals_the_tokenizer_on_ordinary_text():
    encoder = pickle.loads(pickle.dumps(text_encoder(TOKENIZER)))
    texts = ["", "user\n", "The moon, 12 你好。", CODE]
    assert (
        encoder.batch(texts)
        == [encoder(text) for text in texts]
        == [TOKENIZER.encode(text) for text in texts]
    )
