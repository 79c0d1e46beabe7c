"""Datasets: samples, file formats, cutting and dropping, what a micro-batch looks like, preview."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import chat, write_jsonl
from running import ROOT
from test_data_files import layouts

from dataset.chat_format import ChatCoder
from dataset.chat_template import CHAT_TEMPLATE
from dataset.lm_dataset import SFTDataset, describe, load_tokenizer
from dataset.pretrain_dataset import PretrainDataset
from dataset.preview import preview
from dataset.text_encoder import text_encoder
from dataset.token_cache import describe_tokenizer
from trainer import train_full_sft

QUESTION, ANSWER = "What is 2 + 3? \u4f60\u597d \U0001f642", "2 + 3 = 5.\n\u518d\u89c1 caf\u00e9"
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
FORMATS = {
    "minimind": {"conversations": CHAT},
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "openai": {"messages": CHAT},
}


@pytest.fixture(scope="module")
def coder(tokenizer):
    return ChatCoder(tokenizer)


def samples(dataset) -> list[list[list[int]]]:
    return [[part.tolist() for part in dataset[row]] for row in range(len(dataset))]


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


def test_sft_sample(sft, coder):
    dataset = sft([chat(QUESTION, ANSWER), chat("Hi", "Hello"), chat("a", "b")])
    assert len(dataset) == 3
    ids, mask = coder.encode_chats([(CHAT, None)])[0]
    X, Y, loss_mask = dataset[0]
    for part in (X, Y, loss_mask):
        assert part.dtype == torch.int64 and part.shape == (len(ids) - 1,)
    assert X.tolist() == ids[:-1] and Y.tolist() == ids[1:] and loss_mask.tolist() == mask[1:]
    for row in range(3):
        X, Y, loss_mask = dataset[row]
        assert dataset.lengths[row] == len(X) and dataset.supervised[row] == loss_mask.sum() > 0
    assert dataset.stats["tokens"] == dataset.lengths.sum()
    assert dataset.stats["supervised"] == dataset.supervised.sum()


def test_supervised_tokens_spell_the_answer_and_its_end(sft, tokenizer):
    _, Y, loss_mask = sft([chat(QUESTION, ANSWER)])[0]
    assert tokenizer.decode(Y[loss_mask == 1].tolist()) == ANSWER + "<|im_end|>"


def test_loss_on_last(sft, tokenizer):
    rows = [
        {
            "conversations": [
                *chat("a", "first")["conversations"],
                *chat("b", "second")["conversations"],
            ]
        }
    ]
    for loss_on, expected in (
        ("all", "first<|im_end|>second<|im_end|>"),
        ("last", "second<|im_end|>"),
    ):
        _, Y, loss_mask = sft(rows, loss_on=loss_on)[0]
        assert tokenizer.decode(Y[loss_mask == 1].tolist()) == expected


def test_sft_row_is_cut_counted_and_dropped(sft, coder):
    chats = [chat("short", "yes"), chat("short", "very " * 200), chat("very " * 200, "no")]
    dataset = sft(chats, max_length=32)
    assert dataset.stats["rows"] == len(dataset) == 2
    assert (
        dataset.stats["truncated"] == 2
        and dataset.stats["dropped"] == 1
        and dataset.stats["bad"] == 0
    )
    ids, mask = coder.encode_chats([(chats[1]["conversations"], None)])[0]
    X, Y, loss_mask = dataset[1]
    assert len(X) == 32
    assert X.tolist() == ids[:32] and Y.tolist() == ids[1:33] and loss_mask.tolist() == mask[1:33]


def test_row_of_exactly_max_length_is_not_cut(sft):
    tokens = len(sft([chat("a", "b c d")])[0][0])
    assert sft([chat("a", "b c d")], max_length=tokens).stats["truncated"] == 0
    assert sft([chat("a", "b c d")], max_length=tokens - 1).stats["truncated"] == 1


def test_pretrain_document_ends_with_its_token_and_all_tokens_count(pretrain, tokenizer):
    text = "Once upon a time, \u4ece\u524d."
    X, Y, loss_mask = pretrain([{"text": text}])[0]
    ids = [*text_encoder(tokenizer)(text), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert (
        X.tolist() == ids[:-1]
        and Y.tolist() == ids[1:]
        and loss_mask.tolist() == [1] * (len(ids) - 1)
    )
    assert X.dtype == Y.dtype == loss_mask.dtype == torch.int64


def test_control_text_in_a_document_stays_text(pretrain, tokenizer):
    X, Y, _ = pretrain([{"text": "a <|endoftext|> b <|im_end|>"}])[0]
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert not set(X.tolist()) & set(special)
    assert Y[-1] == special[0] and tokenizer.decode(X.tolist()) == "a <|endoftext|> b <|im_end|>"


@pytest.mark.parametrize("words", range(1, 24))
def test_long_documents_predict_every_token_once(pretrain, tokenizer, words):
    text = " ".join(f"word{n}" for n in range(words))
    ids = [*text_encoder(tokenizer)(text), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    dataset = pretrain([{"text": text}], max_length=7)
    predicted, before = [], []
    for X, Y, loss_mask in dataset:
        assert 1 <= len(X) <= 7 and loss_mask.all() and X[1:].tolist() == Y[:-1].tolist()
        predicted += Y.tolist()
        before += X.tolist()
    assert predicted == ids[1:] and before == ids[:-1]
    assert dataset.stats["truncated"] == 0 and dataset.stats["supervised"] == len(ids) - 1


def test_empty_documents_are_dropped_and_counted(pretrain):
    dataset = pretrain([{"text": ""}, {"text": "not empty"}, {"text": ""}])
    assert len(dataset) == 1 and dataset.stats["dropped"] == 2


def test_text_file_is_a_document_a_line(pretrain, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(
        b'\xef\xbb\xbf[first] line\r\n\r\n{"text": "not JSON here"}\nlast \xe4\xbd\xa0'
    )
    expected = [
        {"text": "[first] line"},
        {"text": '{"text": "not JSON here"}'},
        {"text": "last \u4f60"},
    ]
    assert samples(pretrain(path)) == samples(
        pretrain(write_jsonl(tmp_path / "same.jsonl", expected))
    )


def test_collate_lays_samples_end_to_end(sft):
    dataset = sft([chat("a", "b"), chat("a longer question", "a longer answer"), chat("x", "y z")])
    picked = [dataset[row] for row in (2, 0, 1)]
    X, Y, loss_mask, doc_lens = dataset.collate(picked)
    assert doc_lens == [len(sample[0]) for sample in picked] and X.shape == (1, sum(doc_lens))
    for got, parts in zip((X, Y, loss_mask), zip(*picked, strict=True), strict=True):
        assert got.dtype == torch.int64 and got[0].tolist() == torch.cat(parts).tolist()


@pytest.mark.parametrize("parts, multiple", [(1, 1), (2, 2), (2, 6)])
def test_collate_of_nothing_is_padding_without_loss(parts, multiple):
    X, Y, loss_mask, doc_lens = SFTDataset.collate([], parts - 1, parts, multiple)
    assert X.shape == Y.shape == loss_mask.shape == (1, multiple // parts) and doc_lens == []
    assert loss_mask.sum() == 0 and X.dtype == torch.int64


def test_parts_of_a_row_put_together_are_the_row(sft):
    dataset = sft([chat("a", "b"), chat("a longer question", "a longer answer"), chat("x", "y z")])
    picked = [dataset[row] for row in (2, 0, 1)]
    *whole, doc_lens = dataset.collate(picked)
    *parts, lens = zip(*[dataset.collate(picked, part, 3, 6) for part in range(3)], strict=True)
    padding = -sum(doc_lens) % 6
    assert set(map(tuple, lens)) == {tuple(doc_lens)}
    for got, expected in zip(parts, whole, strict=True):
        assert len({part.shape for part in got}) == 1
        assert torch.cat(got, dim=1).tolist() == [expected[0].tolist() + [0] * padding]


def test_dataset_can_be_pickled_and_read_by_workers(sft):
    dataset = sft([chat(f"q{n}", f"a{n} " * (n % 5 + 1)) for n in range(30)])
    expected = samples(dataset)
    assert samples(pickle.loads(pickle.dumps(dataset))) == expected
    for num_workers in (0, 2):
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
        assert [[part.tolist() for part in sample] for sample in loader] == expected


# --------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_layouts_give_the_same_samples(sft, tmp_path, coder, name):
    rows = [FORMATS[name], FORMATS[name]]
    ids, mask = coder.encode_chats([(CHAT, None)])[0]
    expected = [[ids[:-1], ids[1:], mask[1:]]] * 2
    for layout, content in layouts(rows).items():
        path = tmp_path / "data.json"
        path.write_bytes(content)
        assert samples(sft(path)) == expected, layout


def test_real_data_in_a_read_only_folder(shared_data, tokenizer, tmp_path):
    before = sorted(shared_data.iterdir())
    dataset = SFTDataset(shared_data / "alpaca_zh_demo.json", tokenizer, 768, cache_dir=tmp_path)
    rows = len(json.loads((shared_data / "alpaca_zh_demo.json").read_text()))
    assert (
        dataset.stats["bad"] == 0 and dataset.stats["rows"] + dataset.stats["dropped"] == rows > 900
    )
    dataset = PretrainDataset(shared_data / "c4_demo.jsonl", tokenizer, 512, cache_dir=tmp_path)
    assert dataset.stats["bad"] == 0 and len(dataset) > 100
    assert sorted(shared_data.iterdir()) == before


# --------------------------------------------------------------------------------------------------
# What people see
# --------------------------------------------------------------------------------------------------


def test_preview_marks_the_supervised_part(sft, tokenizer):
    turns = [*chat("Hi", "Hello")["conversations"], *chat("And?", "Bye")["conversations"]]
    dataset = sft(
        [{"conversations": turns}, chat("x", "y"), chat("very " * 99, "z")], max_length=60
    )
    shown = preview(dataset, tokenizer, 1)
    assert (
        shown.splitlines()[0]
        == f"--- sample 0: {dataset.lengths[0]} tokens, {dataset.supervised[0]} supervised"
    )
    body = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n"
    body += "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[Bye<|im_end|>]]\n"
    assert f"supervised\n{body}\n--- 2 rows" in shown
    assert "sample 1" not in shown and shown.endswith("1 dropped, 1 truncated")
    assert "\x1b[32mHello<|im_end|>\x1b[0m" in preview(dataset, tokenizer, 1, colour=True)
    assert preview(dataset, tokenizer, 99).count("--- sample") == 2


def test_preview_flag_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [chat("Hi", "Hello"), "{", chat("And?", "Bye")])
    argv = ["--preview", "1", "--skip_bad", "--data_path", data, "--cache_dir", tmp_path / "cache"]
    monkeypatch.setattr(
        sys, "argv", ["train_full_sft.py", *map(str, argv), "--out_dir", str(tmp_path / "out")]
    )
    assert train_full_sft.main() == 0
    printed = capsys.readouterr().out
    assert "[[Hello<|im_end|>]]" in printed and "Bye" not in printed
    assert (
        printed.count("2 rows") == 2 and "1 bad rows skipped (first: line 2: broken JSON" in printed
    )
    assert not (tmp_path / "out").exists()


def test_describe_counts(sft):
    dataset = sft([chat("a", "b")] * 1200)
    tokens, supervised = dataset.stats["tokens"], dataset.stats["supervised"]
    share = f"{tokens:,} tokens, {supervised:,} supervised ({supervised / tokens:.1%})"
    assert describe(dataset) == f"1,200 rows, {share}, 0 dropped, 0 truncated"


def test_what_a_tokenizer_says_of_itself_is_kept_until_its_files_change(tmp_path):
    folder, cache = tmp_path / "tokenizer", tmp_path / "cache"
    shutil.copytree(ROOT / "model/minimind_tokenizer", folder)
    first, again, changed = (load_tokenizer(folder) for _ in range(3))
    text, template = describe_tokenizer(first, cache)
    assert text == first.backend_tokenizer.to_str()
    assert template == json.dumps(CHAT_TEMPLATE)
    assert describe_tokenizer(again, cache) == (text, template) and len(again) == len(first) == 6400
    assert "loaded" in vars(first) and "loaded" not in vars(again)
    first.add_tokens(["<|new|>"])
    first.save_pretrained(folder)
    assert "<|new|>" in describe_tokenizer(changed, cache)[0] and len(changed) == 6401
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        describe_tokenizer(load_tokenizer(folder), cache)


LOADED = """
import sys
from dataset.lm_dataset import SFTDataset, load_tokenizer

tokenizer, (kind, path, cache) = load_tokenizer("model/minimind_tokenizer"), sys.argv[1:]
if kind == "pretrain":
    from dataset.pretrain_dataset import PretrainDataset as SFTDataset
SFTDataset(path, tokenizer, cache_dir=cache)
print(*(name for name in sys.modules if name.startswith("dataset.")))
"""


@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_what_a_file_does_not_need_is_not_loaded(kind, tmp_path):
    row = {"sft": chat("a", "b") | {"source": "web"}, "pretrain": {"text": "a"}}[kind]
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    command = [sys.executable, "-c", LOADED, kind, str(path), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("dataset.") for name in done.stdout.split()}
    special = {"alpaca", "curriculum", "file_kinds", "preview", "read_array", "readers"}
    special |= {"row_faults", "row_fields", "tools", "turn_fields", "cache_checks", "cache_faults"}
    special |= {"chat_format", "chat_rows", "chatml", "text_encoder"}
    special |= {"held_out", "kept_hash", "progress", "public_tokenizer", "rank_rows", "row_parts"}
    own = {"sft": {"sft_encoder", "plain_rows"}, "pretrain": {"pretrain_dataset"}}
    other = own["pretrain" if kind == "sft" else "sft"]
    assert not loaded & (special | other) and own[kind] <= loaded


def test_the_datasets_of_the_stages_have_one_home():
    """Whoever knows `lm_dataset.SFTDataset` finds the other one there, too."""
    from dataset import lm_dataset
    from dataset.lm_dataset import PretrainDataset as found

    assert found is PretrainDataset
    with pytest.raises(AttributeError, match="has no attribute 'DPODataset'"):
        lm_dataset.DPODataset  # noqa: B018
    with pytest.raises(ImportError):
        from dataset.lm_dataset import DPODataset  # noqa: F401
