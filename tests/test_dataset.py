"""Datasets: samples, file formats, cutting and dropping, bad rows, the token cache under kills and races, preview."""

import hashlib
import json
import mmap
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_jsonl

from dataset import lm_dataset, read_rows, token_cache
from dataset.chat_format import chat_coder, encode_chat, plain_encoder
from dataset.lm_dataset import PretrainDataset, SFTDataset, describe, preview

FORK = multiprocessing.get_context("fork")  # the imports are made: a child starts in no time

QUESTION, ANSWER = "What is 2 + 3? \u4f60\u597d \U0001f642", "2 + 3 = 5.\n\u518d\u89c1 caf\u00e9"
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
FORMATS = {
    "minimind": {"conversations": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "openai": {"messages": CHAT},
}


def chat(question: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def coder(tokenizer):
    return chat_coder(tokenizer)


@pytest.fixture
def sft(tokenizer, tmp_path):
    """sft(rows or path, **options) -> SFTDataset with its cache below tmp_path."""

    def open_dataset(data, max_length=512, **options):
        path = data if isinstance(data, Path) else write_jsonl(tmp_path / "data.jsonl", data)
        return SFTDataset(path, tokenizer, max_length, cache_dir=tmp_path / "cache", **options)

    return open_dataset


@pytest.fixture
def pretrain(tokenizer, tmp_path):
    """pretrain(rows or path, **options) -> PretrainDataset with its cache below tmp_path."""

    def open_dataset(data, max_length=512, **options):
        path = data if isinstance(data, Path) else write_jsonl(tmp_path / "data.jsonl", data)
        return PretrainDataset(path, tokenizer, max_length, cache_dir=tmp_path / "cache", **options)

    return open_dataset


@pytest.fixture
def encoder_calls(monkeypatch):
    """A list that grows by one with every chunk that the tokenizer is asked to encode."""
    calls, encode = [], lm_dataset.encode_chats

    def counted(*args):
        calls.append(len(args[0]))
        return encode(*args)

    monkeypatch.setattr(lm_dataset, "encode_chats", counted)
    return calls


def samples(dataset) -> list[list[list[int]]]:
    return [[part.tolist() for part in dataset[row]] for row in range(len(dataset))]


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def test_sft_sample(sft, coder):
    dataset = sft([chat(QUESTION, ANSWER), chat("Hi", "Hello"), chat("a", "b")])
    assert len(dataset) == 3
    ids, mask = encode_chat(CHAT, None, coder)
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
    rows = [{"conversations": [*chat("a", "first")["conversations"], *chat("b", "second")["conversations"]]}]
    for loss_on, expected in (("all", "first<|im_end|>second<|im_end|>"), ("last", "second<|im_end|>")):
        _, Y, loss_mask = sft(rows, loss_on=loss_on)[0]
        assert tokenizer.decode(Y[loss_mask == 1].tolist()) == expected


def test_sft_row_is_cut_counted_and_dropped(sft, coder):
    chats = [chat("short", "yes"), chat("short", "very " * 200), chat("very " * 200, "no")]
    dataset = sft(chats, max_length=32)
    assert dataset.stats["rows"] == len(dataset) == 2
    assert dataset.stats["truncated"] == 2 and dataset.stats["dropped"] == 1 and dataset.stats["bad"] == 0
    ids, mask = encode_chat(chats[1]["conversations"], None, coder)
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
    ids = [*plain_encoder(tokenizer)(text), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert X.tolist() == ids[:-1] and Y.tolist() == ids[1:] and loss_mask.tolist() == [1] * (len(ids) - 1)
    assert X.dtype == Y.dtype == loss_mask.dtype == torch.int64


def test_control_text_in_a_document_stays_text(pretrain, tokenizer):
    X, Y, _ = pretrain([{"text": "a <|endoftext|> b <|im_end|>"}])[0]
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert not set(X.tolist()) & set(special)
    assert Y[-1] == special[0] and tokenizer.decode(X.tolist()) == "a <|endoftext|> b <|im_end|>"


@pytest.mark.parametrize("words", range(1, 24))
def test_long_documents_predict_every_token_once(pretrain, tokenizer, words):
    text = " ".join(f"word{n}" for n in range(words))
    ids = [*plain_encoder(tokenizer)(text), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
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
    path.write_bytes(b'\xef\xbb\xbf[first] line\r\n\r\n{"text": "not JSON here"}\nlast \xe4\xbd\xa0')
    expected = [{"text": "[first] line"}, {"text": '{"text": "not JSON here"}'}, {"text": "last \u4f60"}]
    assert samples(pretrain(path)) == samples(pretrain(write_jsonl(tmp_path / "same.jsonl", expected)))


def test_collate_lays_samples_end_to_end(sft):
    dataset = sft([chat("a", "b"), chat("a longer question", "a longer answer"), chat("x", "y z")])
    picked = [dataset[row] for row in (2, 0, 1)]
    X, Y, loss_mask, doc_lens = dataset.collate(picked)
    assert doc_lens == [len(sample[0]) for sample in picked] and X.shape == (1, sum(doc_lens))
    for got, parts in zip((X, Y, loss_mask), zip(*picked, strict=True), strict=True):
        assert got.dtype == torch.int64 and got[0].tolist() == torch.cat(parts).tolist()


def test_collate_of_nothing_is_one_token_without_loss():
    X, Y, loss_mask, doc_lens = SFTDataset.collate([])
    assert X.shape == Y.shape == loss_mask.shape == (1, 1) and doc_lens == [1]
    assert loss_mask.sum() == 0 and X.dtype == torch.int64


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def layouts(rows: list[dict]) -> dict[str, bytes]:
    """The same rows as files of many shapes."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    array, pretty = json.dumps(rows, ensure_ascii=False), json.dumps(rows, ensure_ascii=False, indent=2)
    texts = {
        "jsonl": "\n".join(lines) + "\n",
        "no newline at the end": "\n".join(lines),
        "blank lines": "\n\n" + "\n \t\n\n".join(lines) + "\n\n\n",
        "crlf": "\r\n".join(lines) + "\r\n",
        "indented": "\n".join("  " + line + " " for line in lines),
        "array": array,
        "array with newline": "\n" + array + "\n",
        "pretty": pretty,
        "pretty crlf": pretty.replace("\n", "\r\n"),
        "array of lines": "[\n" + ",\n".join(lines) + "\n]\n",
        "escaped": json.dumps(rows),
    }
    files = {name: text.encode() for name, text in texts.items()}
    files |= {f"{name} with BOM": b"\xef\xbb\xbf" + files[name] for name in ("jsonl", "crlf", "array", "pretty")}
    return files


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_layouts_give_the_same_samples(sft, tmp_path, coder, name):
    rows = [FORMATS[name], FORMATS[name]]
    ids, mask = encode_chat(CHAT, None, coder)
    expected = [[ids[:-1], ids[1:], mask[1:]]] * 2
    for layout, content in layouts(rows).items():
        path = tmp_path / "data.json"
        path.write_bytes(content)
        assert samples(sft(path)) == expected, layout


@pytest.mark.parametrize("block", [*range(1, 12), 64, 1000])
def test_array_split_anywhere_between_blocks(tmp_path, monkeypatch, block):
    rows = [
        {"a": '\u00e9\u4f60\U0001f642 ] } [ { , " \\ \n', "b": [1, [2.5, {}], None, True], "\u540d": {"c": []}},
        {},
        {"d": "\U0001f642" * 30},
        {"e": -1.25e-3},
    ]
    monkeypatch.setattr(read_rows, "BLOCK", block)
    path = tmp_path / "data.json"
    for name, content in layouts(rows).items():
        path.write_bytes(content)
        assert [row for (_, row, fault), _ in read_rows.read_rows(path) if not fault] == rows, name


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_array_rows_know_their_lines(tmp_path, monkeypatch, block):
    monkeypatch.setattr(read_rows, "BLOCK", block)
    path = tmp_path / "data.json"
    path.write_text('[\n{"a": 1},\n\n{"b":\n\n2}, {"c": 3}\n,{"d": 4}]')
    assert [line for (line, _, _), _ in read_rows.read_rows(path)] == [2, 4, 6, 7]


def test_array_of_scalars_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(read_rows, "BLOCK", 1)  # 12 must not become 1 and 2
    path = tmp_path / "data.json"
    path.write_text('[12, -3, "x", null, true, 10]')
    assert [row for (_, row, _), _ in read_rows.read_rows(path)] == [12, -3.5, "x", None, True, 10]


BROKEN_ARRAYS = {
    b'[{"a": 1},\n{"a": 2}': "2: broken JSON: the array does not end with ]",
    b'[{"a": 1},\n': "2: broken JSON: the array does not end with ]",
    b'[{"a": 1},\n{"a": }]': "2: broken JSON: Expecting value",
    b'[{"a": 1},\n{"a": "2}]': "2: broken JSON: Unterminated string",
    b'[\n{"a":\n\n1 2}]': "4: broken JSON: Expecting ',' delimiter",
    b'[{"a": 1}]\n{"a": 2}': "1: broken JSON: text behind the end of the array",
    b'[{"a": 1}\n]' + b"\n" * 5000 + b"x": "2: broken JSON: text behind the end of the array",
    b'[{"a": 1},\n\n{"a": "caf\xe9"}]': "3: byte 0xe9 at offset 22 is not UTF-8",
    b'[{"a": 1},\n{"a": "\xe4\xbd': "2: byte 0xe4 at offset 18 is not UTF-8",
    b'[{"a": 1},\n' + b"1" * 5000 + b"]": "2: broken JSON: Exceeds the limit",
}


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("content", BROKEN_ARRAYS, ids=list(BROKEN_ARRAYS.values()))
def test_broken_array_names_the_line(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(read_rows, "BLOCK", block)
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_rows.read_rows(path))
    assert str(error.value).startswith(f"{path}:{BROKEN_ARRAYS[content]}")


def test_an_array_element_beyond_the_limit(sft, tmp_path, monkeypatch):
    monkeypatch.setattr(read_rows, "MAX_ROW_BYTES", 2000)
    monkeypatch.setattr(read_rows, "BLOCK", 100)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([chat("a", "b"), chat("a", "b" * 3000)], indent=1))
    with pytest.raises(ValueError, match=rf"{path}:13: row of more than"):
        sft(path)


def test_real_data_in_a_read_only_folder(shared_data, tokenizer, tmp_path):
    before = sorted(shared_data.iterdir())
    for name in ("alpaca_en_demo.json", "alpaca_zh_demo.json"):
        dataset = SFTDataset(shared_data / name, tokenizer, 768, cache_dir=tmp_path)
        rows = len(json.loads((shared_data / name).read_text()))
        assert dataset.stats["bad"] == 0 and dataset.stats["rows"] + dataset.stats["dropped"] == rows > 900
    for name in ("c4_demo.jsonl", "wiki_demo.txt"):
        assert len(PretrainDataset(shared_data / name, tokenizer, 512, cache_dir=tmp_path)) > 100
    assert sorted(shared_data.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows
# ---------------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(chat("a", "b"))
BAD_ROWS = {
    "broken JSON": (b'{"conversations": [', "broken JSON: Expecting value at column 20"),
    "two rows on a line": (GOOD.encode() * 2, "broken JSON: Extra data"),
    "not an object": (b"17", "a row must be a JSON object, found a number"),
    "wrong schema": (b'{"question": "a", "answer": "b"}', "keys found: 'question', 'answer'"),
    "empty conversation": (b'{"conversations": []}', "empty conversation"),
    "unknown role": (GOOD.replace("user", "robot").encode(), "turn 1: unknown role 'robot'"),
    "null content": (GOOD.replace('"b"', "null").encode(), "turn 2: 'content' must be a string, found null"),
    "no assistant turn": (GOOD.replace("assistant", "user").encode(), "no assistant turn"),
    "Latin-1": (GOOD.replace("b", "caf\u00e9").encode("latin-1"), "byte 0xe9 at column"),
    "UTF-16": ("\ufeff" + GOOD).encode("utf-16-le").replace(b"\n", b"") and (b"\xff\xfe{", "byte 0xff at column 1"),
    "lone surrogate": (GOOD.replace('"b"', '"\\ud800"').encode(), "lone surrogate"),
    "deep nesting": (b"[" * 100_000, "recursion"),
    "endless number": (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "20 MB": (b'{"conversations": "' + b"x" * 20_000_000 + b'"}', "row of more than 19 MB, the limit is 8 MB"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_names_file_line_and_reason(sft, tmp_path, name):
    raw, reason = BAD_ROWS[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + raw + b"\n" + GOOD.encode() + b"\n" + raw + b"\n")
    with pytest.raises(ValueError) as error:
        sft(path)
    assert str(error.value).startswith(f"{path}:3: ") and reason in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()], "half a cache stays"

    dataset = sft(path, skip_bad=True)
    assert len(dataset) == 2 and dataset.stats["bad"] == 2
    assert dataset.stats["first_bad"].startswith("line 3: ") and reason in dataset.stats["first_bad"]
    assert "2 bad rows skipped (first: line 3: " in describe(dataset)


def test_the_first_of_several_faults_is_named(sft, tmp_path):
    """Reading, checking and encoding find different faults: the order of the file decides which one is told."""
    wrong_role, broken = GOOD.replace("user", "robot"), "{"
    for lines, where in (([GOOD, wrong_role, broken], ":2: turn 1"), ([GOOD, broken, wrong_role], ":2: broken")):
        with pytest.raises(ValueError, match=where):
            sft(write_jsonl(tmp_path / "bad.jsonl", lines))


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"content": "x"}', 'needs a string under "text"; keys found: content'),
        ('{"text": null}', 'needs a string under "text"'),
        ('{"text": ["a"]}', 'needs a string under "text"'),
        ("[1]", 'must be an object {"text": ...}, found list'),
        ('{"text": "\\udc00"}', "lone surrogate"),
        ('{"text": "a', "broken JSON"),
    ],
)
def test_bad_pretraining_row(pretrain, row, reason):
    with pytest.raises(ValueError) as error:
        pretrain(['{"text": "good"}', row])
    assert "data.jsonl:2: " in str(error.value) and reason in str(error.value)
    assert pretrain(['{"text": "good"}', row], skip_bad=True).stats["bad"] == 1


def test_latin_1_text_file(pretrain, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes("fine\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.txt:2: byte 0xef at column 3 is not UTF-8; convert the file"):
        pretrain(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"[]", b"[ \n ]"])
def test_empty_file(sft, tmp_path, content):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: the file is empty$"):
        sft(path)


def test_file_without_a_usable_row(sft, tmp_path):
    with pytest.raises(ValueError, match=r"no usable row: 0 bad, 1 without a supervised token.*--max_seq_len"):
        sft([chat("very " * 100, "b")], max_length=16)
    with pytest.raises(ValueError, match=r"no usable row: 2 bad, 0 without.* line 1: broken JSON"):
        sft(["{", "{"], skip_bad=True)


def test_missing_file_and_folder(sft, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such data file"):
        sft(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="not a file"):
        sft(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def test_second_open_does_not_tokenise(sft, tmp_path, encoder_calls):
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), chat("c", "d")])
    first = sft(path)
    assert encoder_calls == [2]
    again = sft(path)
    copy = sft(Path(shutil.copy(path, tmp_path / "elsewhere.json")))
    assert encoder_calls == [2]
    assert first.key == again.key == copy.key and first.stats == again.stats == copy.stats
    assert samples(first) == samples(again) == samples(copy)


def test_anything_that_matters_makes_another_cache(sft, tokenizer, tmp_path, encoder_calls):
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), chat("c", "d")])
    other = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["<other>"])
    keys = [
        sft(path).key,
        sft(path, max_length=256).key,
        sft(path, loss_on="last").key,
        sft(path, skip_bad=True).key,
        SFTDataset(path, other, 512, cache_dir=tmp_path / "cache").key,
        sft(write_jsonl(tmp_path / "data.jsonl", [chat("a", "b"), chat("c", "e")])).key,
    ]
    assert len(set(keys)) == len(keys) == len(encoder_calls)


def test_pretraining_and_sft_of_one_file_do_not_mix(sft, pretrain, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{**chat("a", "b"), "text": "a b"}])
    assert sft(path).key != pretrain(path).key


def test_edit_that_keeps_size_and_time_is_seen(sft, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")])
    stat, before = path.stat(), sft(path)
    path.write_text(path.read_text().replace('"b"', '"c"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = sft(path)
    assert after.key != before.key and samples(after) != samples(before)


def test_torn_memory_of_a_hash_is_made_again(sft, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")])
    key = sft(path).key
    for text in ("", "{", "[]", '{"identity": []}'):
        for memo in (tmp_path / "cache").glob("hash_*.json"):
            memo.write_text(text)
        assert sft(path).key == key


def in_child(function, *args):
    """Start function(*args) in a process of its own. A child never returns into the test runner."""

    def target():
        try:
            function(*args)
        except BaseException as error:  # noqa: BLE001, whatever it is, the parent is to see it as a failure
            print(f"child: {error!r}")
            os._exit(3)
        os._exit(0)

    process = FORK.Process(target=target)
    process.start()
    return process


def cache_content(cache_dir: Path) -> dict[str, str]:
    """The complete caches: file -> hash."""
    folders = [folder for folder in cache_dir.iterdir() if folder.is_dir()]
    assert not [folder for folder in folders if folder.suffix == ".building"]
    files = [file for folder in folders for file in folder.iterdir() if file.name != "meta.json"]
    return {str(file.relative_to(cache_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("moment", ["encode", "save", "replace"])
def test_killed_build_leaves_nothing_half_usable(sft, tmp_path, monkeypatch, moment):
    path = write_jsonl(tmp_path / "data.jsonl", [chat(f"q{n}", f"a{n} " * n) for n in range(60)])
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 500)
    expected = samples(sft(path))
    whole = cache_content(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")

    def die_midway():
        count, module, name = {
            "encode": (5, lm_dataset, "encode_chats"),  # some chunks are written
            "save": (2, token_cache.np, "save"),  # the arrays are there, the counts are not
            "replace": (2, token_cache.os, "replace"),  # all is there, under the wrong name; the first is the hash
        }[moment]
        original, left = getattr(module, name), [count]

        def deadly(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(module, name, deadly)
        sft(path)

    process = in_child(die_midway)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = [entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert [Path(name).suffix for name in left] == [".building"]

    assert samples(sft(path)) == expected
    assert cache_content(tmp_path / "cache") == whole


def test_two_starts_at_once_build_once(sft, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [chat(f"q{n}", f"a{n}") for n in range(50)])
    results, second_starts = FORK.SimpleQueue(), FORK.Event()
    encode = lm_dataset.encode_chats

    def first():
        def slow(*args):  # holds the lock until the second one is at the door
            second_starts.wait(60)
            return encode(*args)

        monkeypatch.setattr(lm_dataset, "encode_chats", slow)
        results.put(samples(sft(path)))

    def second():
        def refuse(*args):
            raise AssertionError("tokenised twice")

        while not list((tmp_path / "cache").glob("*.building")):
            os.sched_yield()
        monkeypatch.setattr(lm_dataset, "encode_chats", refuse)
        second_starts.set()
        results.put(samples(sft(path)))

    processes = [in_child(first), in_child(second)]
    both = [results.get(), results.get()]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert both[0] == both[1] == samples(sft(path)) and len(both[0]) == 50


def test_unwritable_cache_folder(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")])
    with pytest.raises(ValueError, match=r"cannot use .*data\.jsonl.*: Not a directory; see .*--cache_dir"):
        SFTDataset(path, tokenizer, 512, cache_dir=path / "cache")


def test_full_disk_leaves_no_cache(sft, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [chat(f"q{n}", f"a{n} " * 20) for n in range(400)])
    results = FORK.SimpleQueue()

    def build():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a write beyond it fails as on a full disk
        try:
            sft(path)
        except ValueError as error:
            results.put(str(error))

    process = in_child(build)
    process.join()
    assert process.exitcode == 0
    message = results.get()
    assert message.endswith("the token cache needs about the size of the data") and "None" not in message
    assert cache_content(tmp_path / "cache") == {}
    assert len(sft(path)) == 400


def test_build_that_is_interrupted_cleans_up(sft, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_dataset, "encode_chats", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sft([chat("a", "b")])
    assert cache_content(tmp_path / "cache") == {}


def test_chunks_do_not_matter(sft, tmp_path, monkeypatch):
    rows = [chat(f"q{n}", f"a{n} " * (n % 7 + 1)) for n in range(60)]
    expected = samples(sft(rows))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 1)
    assert samples(sft(rows)) == expected


def test_mapped_pages_are_released(sft, monkeypatch):
    """Pages that were read count as memory of the process: without this, an epoch would hold the whole cache."""
    released = []

    class Recorded(mmap.mmap):
        def madvise(self, option, *rest):
            released.append((len(self), option))
            return super().madvise(option, *rest)

    monkeypatch.setattr(token_cache.mmap, "mmap", Recorded)
    monkeypatch.setattr(token_cache, "DROP_PAGES_EVERY", 4)
    dataset = sft([chat("a", f"b {n}") for n in range(10)])
    before = samples(dataset)
    sizes = [(dataset.cache.folder / name).stat().st_size for name in ("tokens.bin", "mask.bin")]
    assert released == [(size, mmap.MADV_DONTNEED) for _ in range(2) for size in sizes]
    assert samples(dataset) == before


def test_large_vocabularies_need_wider_ids(tmp_path):
    def encode(rows):
        return [([([1, 70_000, 2], [0, 1, 1])], False) for _ in rows]

    path = write_jsonl(tmp_path / "data.jsonl", [{}])
    cache = token_cache.open_cache(path, tmp_path / "cache", {}, 70_001, True, encode, False)
    assert cache[0][0].tolist() == [1, 70_000, 2] and cache.dtype == np.uint32


def test_dataset_can_be_pickled_and_read_by_workers(sft):
    dataset = sft([chat(f"q{n}", f"a{n} " * (n % 5 + 1)) for n in range(30)])
    expected = samples(dataset)
    assert samples(pickle.loads(pickle.dumps(dataset))) == expected
    for num_workers in (0, 2):
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
        assert [[part.tolist() for part in sample] for sample in loader] == expected


# ---------------------------------------------------------------------------------------------------------------------
# What people see
# ---------------------------------------------------------------------------------------------------------------------


def test_preview_marks_the_supervised_part(sft, tokenizer):
    turns = [*chat("Hi", "Hello")["conversations"], *chat("And?", "Bye")["conversations"]]
    dataset = sft([{"conversations": turns}, chat("x", "y"), chat("very " * 99, "z")], max_length=60)
    shown = preview(dataset, tokenizer, 1)
    assert shown.splitlines()[0] == f"--- sample 0: {dataset.lengths[0]} tokens, {dataset.supervised[0]} supervised"
    body = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n"
    body += "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[Bye<|im_end|>]]\n"
    assert f"supervised\n{body}\n--- 2 rows" in shown
    assert "sample 1" not in shown and shown.endswith("1 dropped, 1 truncated")
    assert "\x1b[32mHello<|im_end|>\x1b[0m" in preview(dataset, tokenizer, 1, colour=True)
    assert preview(dataset, tokenizer, 99).count("--- sample") == 2


def test_describe_counts(sft):
    dataset = sft([chat("a", "b")] * 1200)
    tokens, supervised = dataset.stats["tokens"], dataset.stats["supervised"]
    share = f"{tokens:,} tokens, {supervised:,} supervised ({supervised / tokens:.1%})"
    assert describe(dataset) == f"1,200 rows, {share}, 0 dropped, 0 truncated"
