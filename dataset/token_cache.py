"""Tokenise a data file once, into arrays on disk that training maps into memory.

A cache is a folder named by a hash of everything its content depends on: the bytes of the data
file, the tokenizer and the options. It is built beside its place and renamed into it when complete,
under a lock: a killed build leaves nothing that could be taken for a cache, and of several
processes one builds while the others wait.

Every row has a checksum, which is compared whenever the row is read, and so has every small file,
when the cache is opened. A cache that is not what was written is built again: at once, or by the
next start where it is found in a run.
"""

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.read_rows import Row, read_rows

VERSION = 2  # raise it when the meaning of the cached arrays changes
CHUNK_BYTES = (
    1 << 20
)  # text encoded in one call: enough to keep all cores busy, small enough to keep memory flat
ALTERED = "altered"  # a file in a cache that says: build it again
DROP_PAGES_EVERY = (
    1 << 9
)  # rows read between two releases of the mapped pages; a read can map 64 KB

# The rows of a chunk -> for each its token pieces [(ids, mask), ...] and whether it was truncated,
# or what is wrong with it. A row without pieces is dropped and counted.
Encoder = Callable[
    [list[object]], list[tuple[list[tuple[list[int], list[int]]], bool] | ValueError]
]


class TokenCache:
    """A complete cache, open for reading.

    Attributes:
        key: hash of content, tokenizer and options; the same data has the same key wherever its
        file lies. lengths: (rows,) int32, tokens of each row including the one that is only
        predicted. supervised: (rows,) int32, tokens of each row that carry loss.
        difficulty: (rows,) float64, what the field that was asked for says of each row; None where
        none was. checksums: (rows, 2) uint32, of the tokens and of the mask of each row; None in a
        cache older than these. stats: what building it counted: rows, tokens, supervised, dropped,
        truncated, bad, first_bad.
    """

    def __init__(self, folder: Path):
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if (folder / ALTERED).exists():
                raise ValueError("a row differed from its checksum")
            if {"checksum", "checksums"} & meta.keys() and meta_checksum(meta) != meta.get(
                "checksum"
            ):
                raise ValueError("meta.json differs from its checksum")
            self.folder, self.key, self.stats = folder, meta["key"], meta["stats"]
            self.dtype, self.masked = np.dtype(meta["dtype"]), meta["masked"]
            known = meta.get("checksums", {})
            self.lengths, self.supervised = (
                load_array(folder / f"{n}.npy", known) for n in ("lengths", "supervised")
            )
            self.difficulty = (
                load_array(folder / "difficulty.npy", known) if meta.get("field") else None
            )
            self.checksums = load_array(folder / "checksums.npy", known) if known else None
            self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
            for name, width in (
                ("tokens.bin", self.dtype.itemsize),
                ("mask.bin", int(self.masked)),
            ):
                if (folder / name).stat().st_size != self.starts[-1] * width:
                    raise ValueError(f"{name} has a wrong size")
        except Exception as error:  # of json and numpy, a dozen types for a damaged header
            raise ValueError(f"the token cache {folder} is damaged: {error}") from None
        self.maps: dict[
            str, mmap.mmap
        ] = {}  # opened on first use, so that every worker process maps for itself
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
        if (
            self.reads % DROP_PAGES_EVERY == 0
        ):  # mapped pages count as this process's memory until they are released
            for mapped in self.maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
        stored = self.read("tokens.bin", self.dtype, row)
        mask = self.read("mask.bin", np.dtype(np.uint8), row) if self.masked else None
        if self.checksums is not None:
            tokens_sum, mask_sum = self.checksums[row].tolist()
            if zlib.crc32(stored) != tokens_sum:
                self.refuse("tokens.bin", row)
            if self.masked and zlib.crc32(mask) != mask_sum:
                self.refuse("mask.bin", row)
        ids = stored.astype(np.int64)
        mask = np.ones(len(ids), np.uint8) if mask is None else mask.copy()
        if self.checksums is None and np.count_nonzero(mask[1:]) != self.supervised[row]:
            self.refuse("mask.bin", row)
        return ids, mask

    def refuse(self, name: str, row: int) -> None:
        """Stop at a row that is not what was written. The cache stays for those who read it, until
        the next start."""
        advice = "the next start builds this cache again: go on with --resume auto"
        try:
            (self.folder / ALTERED).touch()
        except OSError:
            advice = f"delete {self.folder} to have it built again"
        raise ValueError(
            f"{self.folder / name} was altered: row {row} differs from its checksum; {advice}"
        )


def load_array(path: Path, checksums: dict) -> np.ndarray:
    """A small array of a cache; ValueError: it differs from its checksum, where it has one."""
    array = np.load(path)
    if path.name in checksums and array_checksum(array) != checksums[path.name]:
        raise ValueError(f"{path.name} differs from its checksum")
    return array


def array_checksum(array: np.ndarray) -> int:
    return zlib.crc32(array, zlib.crc32(f"{array.dtype.str} {array.shape}".encode()))


def meta_checksum(meta: dict) -> int:
    """Of what meta.json says, this number apart."""
    return zlib.crc32(json.dumps({**meta, "checksum": 0}, sort_keys=True).encode())


def file_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's content, remembered until the file changes.

    The memory is keyed by size, inode and both times; the change time cannot be set back, so an
    edit is always seen.
    """
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache_dir / f"hash_{hashlib.sha256(os.fsencode(identity[0])).hexdigest()[:16]}.json"
    known = recall(memo)
    if known and known["identity"] == identity:
        return known["sha256"]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    remember(memo, {"identity": identity, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def remember(path: Path, value: dict) -> None:
    """Write what `recall` gives back."""
    replace_file(path, json.dumps({**value, "checksum": meta_checksum(value)}))


def recall(path: Path) -> dict | None:
    """What was remembered; None: nothing, or it is torn or altered."""
    try:
        value = json.loads(path.read_text("utf-8"))
        return value if value["checksum"] == meta_checksum(value) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        options: everything besides the file's bytes that the content depends on (tokenizer,
        lengths, ...). encode: turns the rows of a chunk into token pieces.
        skip_bad: leave bad rows out and count them.
        field: of the rows, which holds how hard they are; a row without a number there is bad.

    Raises:
        ValueError: missing, empty or unreadable file; a bad row (`file:line: reason`) unless
        skip_bad; no row left.
    """
    if not data_path.is_file():
        raise ValueError(
            f"{data_path}: no such data file"
            if not data_path.exists()
            else f"{data_path}: not a file"
        )
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        content = file_hash(data_path, cache_dir)
    except OSError as error:
        raise ValueError(
            f"cannot use {error.filename or cache_dir}: {error.strerror}; see --data_path and"
            " --cache_dir"
        ) from None
    options = options | ({"field": field} if field else {})
    described = json.dumps([VERSION, content, skip_bad, masked, options], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()[:32]
    folder = cache_dir / key
    try:
        return TokenCache(folder)
    except ValueError as error:  # there is none, most often
        problem = f"{error}; " if folder.exists() else ""
    try:
        lock = open(cache_dir / f"{key}.lock", "w")
    except OSError as error:
        raise ValueError(
            f"{problem}cannot write {error.filename}: {error.strerror}; see --cache_dir"
        ) from None
    with lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # released by the kernel when the holder dies, however it dies
        try:
            return TokenCache(folder)  # of another process that held the lock
        except ValueError as error:
            if folder.exists():
                print(f"{error}: it is built again", file=sys.stderr, flush=True)
        build(data_path, folder, key, vocab_size, masked, encode, skip_bad, field)
    return TokenCache(folder)


def difficulty_of(row: object, field: str) -> float:
    """The number in a field of a row; ValueError: there is none."""
    value = row.get(field) if isinstance(row, dict) else None
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    ):
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
    building, damaged = (
        folder.with_name(f"{folder.name}.{what}") for what in ("building", "damaged")
    )
    for path in (building, damaged):  # of a build that was killed
        shutil.rmtree(path, ignore_errors=True)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    stats = {
        "rows": 0,
        "tokens": 0,
        "supervised": 0,
        "dropped": 0,
        "truncated": 0,
        "bad": 0,
        "first_bad": "",
    }
    lengths, supervised, difficulty, checksums = (
        [np.zeros(0, np.int32)],
        [np.zeros(0, np.int32)],
        [],
        [],
    )

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
        ids, mask = np.array(ids, dtype), np.array(mask, np.uint8)
        tokens_file.write(ids)  # tofile would not say why it failed
        if masked:
            mask_file.write(mask)
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        sums = [
            (zlib.crc32(ids[a:b]), zlib.crc32(mask[a:b]))
            for a, b in zip([0, *ends], ends, strict=False)
        ]
        checksums.append(np.array(sums, np.uint32).reshape(-1, 2))
        lengths.append(np.array(sizes, np.int32))
        supervised.append(np.array(counts, np.int32))
        if field:
            difficulty.append(np.array(numbers, np.float64))

    try:
        building.mkdir()
        size = data_path.stat().st_size
        every = (
            0.1 if sys.stderr.isatty() else 60
        )  # seconds between two looks at the bar: a log gets one a minute
        name = f"tokenising {data_path.name}"
        with (
            open(building / "tokens.bin", "wb") as tokens_file,
            open(building / "mask.bin", "wb") as mask_file,
            tqdm(
                total=size, unit="B", unit_scale=True, desc=name, mininterval=every, delay=every
            ) as bar,
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
            why = (
                f"{stats['bad']} bad, {stats['dropped']} without a supervised token within"
                " max_seq_len"
            )
            raise ValueError(
                f"{data_path}: no usable row: {why}; see --max_seq_len. {stats['first_bad']}".rstrip()
            )
        stats["rows"] = len(all_lengths)
        stats["tokens"] = int(all_lengths.sum(dtype=np.int64)) - len(all_lengths)
        stats["supervised"] = int(all_supervised.sum(dtype=np.int64))
        arrays = {"lengths.npy": all_lengths, "supervised.npy": all_supervised}
        arrays["checksums.npy"] = np.concatenate(checksums)
        meta = {
            "key": key,
            "dtype": dtype.name,
            "masked": masked,
            "source": data_path.name,
            "stats": stats,
        }
        if field:
            arrays["difficulty.npy"] = np.concatenate(difficulty)
            meta["field"] = field
        for name, array in arrays.items():
            np.save(building / name, array)
        meta["checksums"] = {name: array_checksum(array) for name, array in arrays.items()}
        meta["checksum"] = meta_checksum(meta)
        (building / "meta.json").write_text(json.dumps(meta))
        for path in building.iterdir():  # to the disk before the name that vouches for them
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if (
            folder.exists()
        ):  # a damaged one: out of sight first, as a folder replaces none that has files
            os.rename(folder, damaged)
        os.replace(building, folder)
    except OSError as error:
        where, why = error.filename or building, error.strerror or error
        raise ValueError(
            f"{where}: {why}; the token cache needs about the size of the data"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
