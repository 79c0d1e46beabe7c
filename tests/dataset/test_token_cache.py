"""The token cache: found by content, whole or not there, despite kills, races and full disks."""

import hashlib
import json
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN_FLAGS, chat, curve, write_jsonl
from running import ROOT, run_ranks

from dataset import cache_builder, cached_dataset, lm_dataset, token_cache
from dataset.kept_hash import kept_hash
from dataset.lm_dataset import SFTDataset
from dataset.packing import batches, plan_epoch
from dataset.pretrain_dataset import PretrainDataset
from dataset.sft_encoder import SFTEncoder
from runtime.process import faults

FORK = multiprocessing.get_context("fork")  # the imports are made: a child starts in no time


@pytest.fixture
def encoder_calls(monkeypatch):
    """A list that grows by one with every chunk that the tokenizer is asked to encode."""
    calls, encode = [], SFTEncoder.encode

    def counted(*args):
        calls.append(len(args[1]))
        return encode(*args)

    monkeypatch.setattr(SFTEncoder, "encode", counted)
    return calls


def samples(dataset) -> list[list[list[int]]]:
    return [[part.tolist() for part in dataset[row]] for row in range(len(dataset))]


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


def test_pretraining_and_sft_of_one_file_do_not_mix(sft, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{**chat("a", "b"), "text": "a b"}])
    assert sft(path).key != PretrainDataset(path, tokenizer, 512, cache_dir=tmp_path / "cache").key


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) + 1])
def test_a_kept_hash_is_that_of_the_content(tmp_path, size):
    path = tmp_path / "data.jsonl"
    path.write_bytes(os.urandom(size))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    hashes = [kept_hash(path, tmp_path), kept_hash(path, tmp_path)]
    assert [*hashes, token_cache.file_hash(path, tmp_path)] == [expected] * 3


@pytest.mark.parametrize("large", [0, token_cache.LARGE])
def test_edit_that_keeps_size_and_time_is_seen(sft, tmp_path, monkeypatch, large):
    monkeypatch.setattr(token_cache, "LARGE", large)
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")])
    stat, before = path.stat(), sft(path)
    path.write_text(path.read_text().replace('"b"', '"c"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = sft(path)
    assert after.key != before.key and samples(after) != samples(before)


def test_torn_memory_of_a_hash_is_made_again(sft, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")])
    key = sft(path).key
    assert not list((tmp_path / "cache").glob("hash_*.json")), "of a small file none is kept"
    monkeypatch.setattr(token_cache, "LARGE", 0)
    assert sft(path).key == key
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
    return {
        str(file.relative_to(cache_dir)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.mark.parametrize("moment", ["encode", "save", "replace"])
def test_killed_build_leaves_nothing_half_usable(sft, tmp_path, monkeypatch, moment):
    path = write_jsonl(tmp_path / "data.jsonl", [chat(f"q{n}", f"a{n} " * n) for n in range(60)])
    monkeypatch.setattr(cache_builder, "CHUNK_BYTES", 500)
    expected = samples(sft(path))
    whole = cache_content(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")

    def die_midway():
        count, module, name = {
            "encode": (5, SFTEncoder, "encode"),  # some chunks are written
            "save": (2, cache_builder.np, "save"),  # the arrays are there, the counts are not
            # All is there, under the wrong name.
            "replace": (1, cache_builder.os, "replace"),
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
    encode = SFTEncoder.encode

    def first():
        def slow(*args):  # holds the lock until the second one is at the door
            second_starts.wait(60)
            return encode(*args)

        monkeypatch.setattr(SFTEncoder, "encode", slow)
        results.put(samples(sft(path)))

    def second():
        def refuse(*args):
            raise AssertionError("tokenised twice")

        while not list((tmp_path / "cache").glob("*.building")):
            os.sched_yield()
        monkeypatch.setattr(SFTEncoder, "encode", refuse)
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
    with pytest.raises(
        ValueError, match=r"cannot use .*data\.jsonl.*: Not a directory; see .*--cache_dir"
    ):
        SFTDataset(path, tokenizer, 512, cache_dir=path / "cache")


def test_full_disk_leaves_no_cache(sft, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [chat(f"q{n}", f"a{n} " * 20) for n in range(400)])
    results = FORK.SimpleQueue()

    def build():
        # A write beyond it fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            sft(path)
        except ValueError as error:
            results.put(str(error))

    process = in_child(build)
    process.join()
    assert process.exitcode == 0
    message = results.get()
    assert (
        message.endswith("the token cache needs about the size of the data")
        and "None" not in message
    )
    assert cache_content(tmp_path / "cache") == {}
    assert len(sft(path)) == 400


def test_build_that_is_interrupted_cleans_up(sft, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTEncoder, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sft([chat("a", "b")])
    assert cache_content(tmp_path / "cache") == {}


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "lengths.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_cache_is_built_again(sft, capfd, name, damage):
    before = sft([chat("a", "b")])
    folder, expected = before.folder, samples(before)
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert samples(sft([chat("a", "b")])) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"the token cache {folder} is damaged: ") and line.endswith(
        ": it is built again"
    )
    assert samples(sft([chat("a", "b")])) == expected and not capfd.readouterr().err


def flip(path, at: int) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["lengths.npy", "supervised.npy", "checksums.npy", "meta.json"])
def test_no_bit_of_a_small_file_changes_what_is_read(sft, capfd, name):
    rows = [chat("a", "b"), chat("c", "d e")]
    first = sft(rows)
    for at in range(0, (first.folder / name).stat().st_size, 9):
        flip(first.folder / name, at)
        again = sft(rows)
        assert (
            samples(again) == samples(first)
            and again.stats == first.stats
            and again.key == first.key
        ), at
        assert np.array_equal(again.supervised, first.supervised) and np.array_equal(
            again.lengths, first.lengths
        )


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin"])
def test_no_bit_of_a_row_changes_in_silence(sft, capfd, name):
    rows = [chat("a", "b"), chat("c", "d e")]
    first = sft(rows)
    expected, path = samples(first), first.folder / name
    for at in range(0, path.stat().st_size, 5):
        flip(path, at)
        opened = sft(rows)
        with pytest.raises(
            ValueError,
            match=rf"^{path} was altered: row \d differs from its checksum; the next start",
        ):
            samples(opened)
        assert samples(sft(rows)) == expected, "the next start builds it again"
    assert capfd.readouterr().err.count("is built again") == len(range(0, path.stat().st_size, 5))


def test_a_cache_without_checksums_is_read_and_its_mask_counted(sft, capfd):
    """As versions before the checksums built them."""
    first = sft([chat("a", "b")])
    folder, expected = first.folder, samples(first)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"], meta["checksums"]
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "checksums.npy").unlink()
    older = sft([chat("a", "b")])
    assert samples(older) == expected and older.checksums is None and not capfd.readouterr().err
    (folder / "mask.bin").write_bytes(bytes((folder / "mask.bin").stat().st_size))
    assert samples(sft([chat("a", "b")])) == expected
    assert "mask.bin was altered: it is built again" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["hash", "tokenizer"])
def test_what_is_remembered_of_files_is_checked(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(token_cache, "LARGE", 0)
    path, folder = write_jsonl(tmp_path / "data.jsonl", [chat("a", "b")]), tmp_path / "cache"

    def opened():
        dataset = SFTDataset(
            path,
            lm_dataset.load_tokenizer(ROOT / "model/minimind_tokenizer"),
            512,
            cache_dir=folder,
        )
        return dataset.key, samples(dataset)

    expected = opened()
    (memo,) = folder.glob(f"{kind}_*.json")
    for at in range(0, memo.stat().st_size, 1 + memo.stat().st_size // 9):
        flip(memo, at)
        assert opened() == expected


def test_a_run_stops_at_an_altered_row_and_the_next_one_builds_the_cache_again(job):
    """Also with processes that read ahead: one line, without their tracebacks."""
    flags = ["--from_weight=none", "--max_steps=3", "--batch_size=30"]
    whole = job("whole", 90, *flags)
    (tokens,) = job.folder.glob("cache/*/tokens.bin")
    flip(tokens, 5)
    words = ["trainer/train_full_sft.py", *RUN_FLAGS, f"--data_path={job.data[90]}", *flags]
    words += [f"--cache_dir={job.folder / 'cache'}", f"--out_dir={job.folder / 'altered'}"]
    printed = run_ranks(*words, code=2)
    (line,) = [line for line in printed.splitlines() if "altered: row" in line]
    assert (
        line.startswith(f"error: {tokens} was altered: row 0 differs")
        and "Traceback" not in printed
    )
    run = job("again", 90, *flags)
    assert [line["loss"] for line in curve(run)] == [line["loss"] for line in curve(whole)]


def test_what_a_reading_process_finds_is_one_line(sft):
    dataset = sft([chat("a", "b")])
    flip(dataset.folder / "mask.bin", 1)
    plan = plan_epoch(dataset, np.arange(1), 0, 512, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="mask.bin was altered") as raised:
        list(batches(dataset, plan, range(1), 0, 1, 1, num_workers=1))
    assert faults.explain(raised.value).startswith(
        f"{dataset.folder / 'mask.bin'} was altered: row 0 "
    )


def test_chunks_do_not_matter(sft, tmp_path, monkeypatch):
    rows = [chat(f"q{n}", f"a{n} " * (n % 7 + 1)) for n in range(60)]
    expected = samples(sft(rows))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(cache_builder, "CHUNK_BYTES", 1)
    assert samples(sft(rows)) == expected


def test_mapped_pages_are_released(sft, monkeypatch):
    """Pages that were read count as memory: without this, an epoch would hold the whole cache."""
    released = []

    class Recorded(mmap.mmap):
        def madvise(self, option, *rest):
            released.append((len(self), option))
            return super().madvise(option, *rest)

    monkeypatch.setattr(cached_dataset.mmap, "mmap", Recorded)
    monkeypatch.setattr(cached_dataset, "DROP_PAGES_EVERY", 4)
    dataset = sft([chat("a", f"b {n}") for n in range(10)])
    before = samples(dataset)
    sizes = [(dataset.folder / name).stat().st_size for name in ("tokens.bin", "mask.bin")]
    assert released == [(size, mmap.MADV_DONTNEED) for _ in range(2) for size in sizes]
    assert samples(dataset) == before


def test_large_vocabularies_need_wider_ids(tokenizer, tmp_path, monkeypatch):
    class Encoder:
        def parse(self, row):
            return row

        def encode(self, rows):
            return [([([1, 70_000, 2], [0, 1, 1])], False) for _ in rows]

    path = write_jsonl(tmp_path / "data.jsonl", [{}])
    monkeypatch.setattr(type(tokenizer), "__len__", lambda tokenizer: 70_001)
    options = (tokenizer, {}, Encoder, True, tmp_path / "cache", False, "none")
    dataset = cached_dataset.CachedDataset(path, *options)
    assert dataset[0][0].tolist() == [1, 70_000] and dataset.dtype == np.uint32


def test_a_file_name_that_is_no_utf8(sft, tmp_path):
    path = write_jsonl(tmp_path / "caf\udce9.jsonl", [chat("q", "a")])
    assert len(sft(path)) == len(sft(path)) == 1
