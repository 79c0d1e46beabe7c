"""Tokenise a data file once, into arrays on disk that training maps into memory.

A cache is a folder named by a hash of everything its content depends on: the bytes of the data file, the tokenizer and
the options. It is built beside its place and renamed into it when complete, under a lock: a killed build leaves nothing
that could be taken for a cache, and of several processes one builds while the others wait.
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.read_rows import Row, read_rows

VERSION = 2  # raise it when the meaning of the cached arrays changes
CHUNK_BYTES = 1 << 20  # text encoded in one call: enough to keep all cores busy, small enough to keep memory flat
DROP_PAGES_EVERY = 1 << 9  # rows read between two releases of the mapped pages; a read can map 64 KB

# The rows of a chunk -> for each its token pieces [(ids, mask), ...] and whether it was truncated, or what is wrong
# with it. A row without pieces is dropped and counted.
Encoder = Callable[[list[object]], list[tuple[list[tuple[list[int], list[int]]], bool] | ValueError]]


class TokenCache:
    """A complete cache, open for reading.

    Attributes:
        key: hash of content, tokenizer and options; the same data has the same key wherever its file lies.
        lengths: (rows,) int32, tokens of each row including the one that is only predicted.
        supervised: (rows,) int32, tokens of each row that carry loss.
        difficulty: (rows,) float64, what the field that was asked for says of each row; None where none was.
        stats: what building it counted: rows, tokens, supervised, dropped, truncated, bad, first_bad.
    """

    def __init__(self, folder: Path):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.folder, self.key, self.stats = folder, meta["key"], meta["stats"]
            self.dtype, self.masked = np.dtype(meta["dtype"]), meta["masked"]
            self.lengths = np.load(folder / "lengths.npy")
            self.supervised = np.load(folder / "supervised.npy")
            self.difficulty = np.load(folder / "difficulty.npy") if meta.get("field") else None
            self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
            for name, width in (("tokens.bin", self.dtype.itemsize), ("mask.bin", int(self.masked))):
                if (folder / name).stat().st_size != self.starts[-1] * width:
                    raise ValueError(f"{name} has a wrong size")
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{folder}: this token cache is damaged ({error}); delete the folder") from None
        self.maps: dict[str, mmap.mmap] = {}  # opened on first use, so that every worker process maps for itself
        self.reads = 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "maps": {}}

    def read(self, name: str, dtype: np.dtype, row: int) -> np.ndarray:
        if name not in self.maps:
            with open(self.folder / name, "rb") as file:
                self.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.starts[row]) * dtype.itemsize
        return np.frombuffer(self.maps[name], dtype, int(self.lengths[row]), start)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (n,) int64 and mask (n,) uint8 of a row; the mask says which tokens carry loss."""
        self.reads += 1
        if self.reads % DROP_PAGES_EVERY == 0:  # mapped pages count as this process's memory until they are released
            for mapped in self.maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
        ids = self.read("tokens.bin", self.dtype, row).astype(np.int64)
        mask = self.read("mask.bin", np.dtype(np.uint8), row).copy() if self.masked else np.ones(len(ids), np.uint8)
        return ids, mask


def file_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's content, remembered until the file changes.

    The memory is keyed by size, inode and both times; the change time cannot be set back, so an edit is always seen.
    """
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache_dir / f"hash_{hashlib.sha256(os.fsencode(identity[0])).hexdigest()[:16]}.json"
    try:
        known = json.loads(memo.read_text())
        if known["identity"] == identity:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memory of this file, or a torn one: hash again
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    replace_file(memo, json.dumps({"identity": identity, "sha256": digest.hexdigest()}))
    return digest.hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def open_cache(
    data_path: Path,
    cache_dir: Path,
    options: dict,
    vocab_size: int,
    masked: bool,
    encode: Encoder,
    skip_bad: bool,
    field: str | None = None,
) -> TokenCache:
    """The cache of a data file, built first where it does not exist yet.

    Args:
        options: everything besides the file's bytes that the content depends on (tokenizer, lengths, ...).
        encode: turns the rows of a chunk into token pieces.
        skip_bad: leave bad rows out and count them.
        field: of the rows, which holds how hard they are; a row without a number there is bad.

    Raises:
        ValueError: missing, empty or unreadable file; a bad row (`file:line: reason`) unless skip_bad; no row left.
    """
    if not data_path.is_file():
        raise ValueError(f"{data_path}: no such data file" if not data_path.exists() else f"{data_path}: not a file")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        content = file_hash(data_path, cache_dir)
    except OSError as error:
        raise ValueError(
            f"cannot use {error.filename or cache_dir}: {error.strerror}; see --data_path and --cache_dir"
        ) from None
    options = options | ({"field": field} if field else {})
    described = json.dumps([VERSION, content, skip_bad, masked, options], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:32]
    folder = cache_dir / key
    if not folder.is_dir():
        try:
            lock = open(cache_dir / f"{key}.lock", "w")
        except OSError as error:
            raise ValueError(f"cannot write {error.filename}: {error.strerror}; see --cache_dir") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when the holder dies, however it dies
            if not folder.is_dir():
                build(data_path, folder, key, vocab_size, masked, encode, skip_bad, field)
    return TokenCache(folder)


def difficulty_of(row: object, field: str) -> float:
    """The number in a field of a row; ValueError: there is none."""
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    found = "no such field" if value is None else json.dumps(value)[:40]
    raise ValueError(f"--curriculum field:{field} needs a number there, found {found}")


def build(
    data_path: Path,
    folder: Path,
    key: str,
    vocab_size: int,
    masked: bool,
    encode: Encoder,
    skip_bad: bool,
    field: str | None,
) -> None:
    """Encode all rows into a folder beside `folder`, then rename it. The caller holds the lock."""
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    stats = {"rows": 0, "tokens": 0, "supervised": 0, "dropped": 0, "truncated": 0, "bad": 0, "first_bad": ""}
    lengths, supervised, difficulty = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], []

    def bad_row(line: int, reason: str) -> None:
        if not skip_bad:
            raise ValueError(f"{data_path}:{line}: {reason}")
        stats["bad"] += 1
        stats["first_bad"] = stats["first_bad"] or f"line {line}: {reason}"

    def write_chunk(chunk: list[Row]) -> None:
        ids, mask, sizes, counts, numbers = [], [], [], [], []
        encoded = iter(encode([row for _, row, fault in chunk if not fault]))
        for line, row, fault in chunk:  # in the file's order: the first fault is the one reported
            result = ValueError(fault) if fault else next(encoded)
            try:
                if isinstance(result, ValueError):
                    raise result
                number = difficulty_of(row, field) if field else 0.0
            except ValueError as error:
                bad_row(line, str(error))
                continue
            pieces, truncated = result
            numbers.extend([number] * len(pieces))
            stats["dropped"] += not pieces
            stats["truncated"] += truncated
            for row_ids, row_mask in pieces:
                ids.extend(row_ids)
                mask.extend(row_mask)
                sizes.append(len(row_ids))
                counts.append(row_mask.count(1) - row_mask[0])  # the first token is never predicted
        tokens_file.write(np.array(ids, dtype))  # tofile would not say why it failed
        if masked:
            mask_file.write(np.array(mask, np.uint8))
        lengths.append(np.array(sizes, np.int32))
        supervised.append(np.array(counts, np.int32))
        if field:
            difficulty.append(np.array(numbers, np.float64))

    try:
        building.mkdir()
        size = data_path.stat().st_size
        every = 0.1 if sys.stderr.isatty() else 60  # seconds between two looks at the bar: a log gets one a minute
        name = f"tokenising {data_path.name}"
        with (
            open(building / "tokens.bin", "wb") as tokens_file,
            open(building / "mask.bin", "wb") as mask_file,
            tqdm(total=size, unit="B", unit_scale=True, desc=name, mininterval=every, delay=every) as bar,
        ):
            chunk, begin, at = [], 0, 0
            for row, at in read_rows(data_path):
                chunk.append(row)
                if at - begin >= CHUNK_BYTES:
                    write_chunk(chunk)
                    bar.update(at - begin)
                    chunk, begin = [], at
            write_chunk(chunk)
            bar.update(size - begin)
        all_lengths, all_supervised = np.concatenate(lengths), np.concatenate(supervised)
        if len(all_lengths) + stats["dropped"] + stats["bad"] == 0:
            raise ValueError(f"{data_path}: the file is empty")
        if len(all_lengths) == 0:
            why = f"{stats['bad']} bad, {stats['dropped']} without a supervised token within max_seq_len"
            raise ValueError(f"{data_path}: no usable row: {why}; see --max_seq_len. {stats['first_bad']}".rstrip())
        stats["rows"] = len(all_lengths)
        stats["tokens"] = int(all_lengths.sum(dtype=np.int64)) - len(all_lengths)
        stats["supervised"] = int(all_supervised.sum(dtype=np.int64))
        np.save(building / "lengths.npy", all_lengths)
        np.save(building / "supervised.npy", all_supervised)
        meta = {"key": key, "dtype": dtype.name, "masked": masked, "source": data_path.name, "stats": stats}
        if field:
            np.save(building / "difficulty.npy", np.concatenate(difficulty))
            meta["field"] = field
        (building / "meta.json").write_text(json.dumps(meta))
        for path in building.iterdir():  # to the disk before the name that vouches for them
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(building, folder)
    except OSError as error:
        where, why = error.filename or building, error.strerror or error
        raise ValueError(f"{where}: {why}; the token cache needs about the size of the data") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
