"""Tokenise a data file once, into arrays on disk that training maps into memory.

A cache is a folder named by a hash of everything its content depends on: the bytes of the data
file, the tokenizer and the options. It is built beside its place and renamed into it when complete,
under a lock: a killed build leaves nothing that could be taken for a cache, and of several
processes one builds while the others wait.

Every row has a checksum, which is compared whenever the row is read, and so has every small file,
when the cache is opened. A cache that is not what was written is built again: at once, or by the
next start where it is found in a run.
"""

import hashlib
import json
import mmap
import os
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dataset.checksums import array_checksum, dict_checksum, recall, remember
from dataset.tokenizer import LazyTokenizer

VERSION = 2  # raise it when the meaning of the cached arrays changes
ALTERED = "altered"  # a file in a cache that says: build it again
DROP_PAGES_EVERY = 1 << 9  # rows read between two releases of the mapped pages; each can map 64 KB


class TokenCache:
    """A complete cache, open for reading.

    Attributes:
        key: hash of content, tokenizer and options, the same wherever the file lies.
        lengths: (rows,) int32, tokens of each row including the one that is only predicted.
        supervised: (rows,) int32, tokens of each row that carry loss.
        difficulty: (rows,) float64, the field of the curriculum; None without one.
        checksums: (rows, 2) uint32, CRC-32 of each row's tokens and mask; None in an older cache.
        stats: counts: rows, tokens, supervised, dropped, truncated, bad, first_bad.

    Raises:
        ValueError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._open()
        except Exception as error:  # of json and numpy, a dozen types for a damaged header
            raise ValueError(f"the token cache {folder} is damaged: {error}") from None
        self.maps: dict[str, mmap.mmap] = {}  # opened on first use, in every worker process anew
        self.reads = 0

    def _open(self) -> None:
        meta = json.loads((self.folder / "meta.json").read_text())
        if (self.folder / ALTERED).exists():
            raise ValueError("a row differed from its checksum")
        has_checksums = {"checksum", "checksums"} & meta.keys()
        if has_checksums and dict_checksum(meta) != meta.get("checksum"):
            raise ValueError("meta.json differs from its checksum")
        self.key, self.stats = meta["key"], meta["stats"]
        self.dtype, self.masked = np.dtype(meta["dtype"]), meta["masked"]
        known = meta.get("checksums", {})
        self.lengths = self._load_array("lengths.npy", known)
        self.supervised = self._load_array("supervised.npy", known)
        self.difficulty = self._load_array("difficulty.npy", known) if meta.get("field") else None
        self.checksums = self._load_array("checksums.npy", known) if known else None
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        for name, width in (("tokens.bin", self.dtype.itemsize), ("mask.bin", int(self.masked))):
            if (self.folder / name).stat().st_size != self.starts[-1] * width:
                raise ValueError(f"{name} has a wrong size")

    def _load_array(self, name: str, checksums: dict[str, int]) -> np.ndarray:
        array = np.load(self.folder / name)
        if name in checksums and array_checksum(array) != checksums[name]:
            raise ValueError(f"{name} differs from its checksum")
        return array

    def __getstate__(self) -> dict:
        return {**self.__dict__, "maps": {}}

    def _read(self, name: str, dtype: np.dtype, row: int) -> np.ndarray:
        if name not in self.maps:
            with open(self.folder / name, "rb") as file:
                self.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.starts[row]) * dtype.itemsize
        return np.frombuffer(self.maps[name], dtype, int(self.lengths[row]), start)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A row as ids (n,) int64 and mask (n,) uint8, which says what tokens carry loss."""
        self.reads += 1
        if self.reads % DROP_PAGES_EVERY == 0:  # mapped pages count as memory of this process
            for mapped in self.maps.values() if hasattr(mmap, "MADV_DONTNEED") else ():
                mapped.madvise(mmap.MADV_DONTNEED)
        stored = self._read("tokens.bin", self.dtype, row)
        mask = self._read("mask.bin", np.dtype(np.uint8), row) if self.masked else None
        if self.checksums is not None:
            tokens_sum, mask_sum = self.checksums[row].tolist()
            if zlib.crc32(stored) != tokens_sum:
                self._refuse("tokens.bin", row)
            if self.masked and zlib.crc32(mask) != mask_sum:
                self._refuse("mask.bin", row)
        ids = stored.astype(np.int64)
        mask = np.ones(len(ids), np.uint8) if mask is None else mask.copy()
        if self.checksums is None and np.count_nonzero(mask[1:]) != self.supervised[row]:
            self._refuse("mask.bin", row)
        return ids, mask

    def _refuse(self, name: str, row: int) -> None:
        """Stop at an altered row. Until the next start the cache stays for those who read it."""
        advice = "the next start builds this cache again: go on with --resume auto"
        try:
            (self.folder / ALTERED).touch()
        except OSError:
            advice = f"delete {self.folder} to have it built again"
        fault = f"was altered: row {row} differs from its checksum"
        raise ValueError(f"{self.folder / name} {fault}; {advice}")


def file_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's content, remembered in cache_dir until the file changes.

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


def describe_tokenizer(tokenizer, cache_dir: Path) -> tuple[str, str]:
    """All that encoding depends on, as text: the tokenizer, its chat template.

    Of a `LazyTokenizer` that is remembered in cache_dir: a start with a warm cache loads none.
    """
    if not isinstance(tokenizer, LazyTokenizer):
        return tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.chat_template)
    folder = tokenizer.folder
    files = sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")])
    parts = [version(name).encode() for name in ("transformers", "tokenizers")]
    parts += [path.read_bytes() for path in files if path.suffix in (".json", ".txt", ".jinja")]
    parts.append(tokenizer.given_template.encode())
    memo = cache_dir / f"tokenizer_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.json"
    known = recall(memo)
    if known is None:
        template = json.dumps(tokenizer.chat_template)
        text = tokenizer.backend_tokenizer.to_str()
        known = {"size": len(tokenizer), "text": text, "template": template}
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            remember(memo, known)
        except OSError:  # what cannot be written is loaded next time, too
            pass
    tokenizer.size = known["size"]
    return known["text"], known["template"]


def open_cache(
    data_path: Path,
    cache_dir: Path,
    options: dict,
    vocab_size: int,
    masked: bool,
    make_encoder: Callable,
    skip_bad: bool,
    field: str | None = None,
) -> TokenCache:
    """The cache of a data file, built first where it does not exist yet.

    Args:
        options: all besides the file's bytes that the content depends on (tokenizer, lengths, ...).
        vocab_size: of the tokenizer; decides the width of the stored ids.
        masked: whether there are tokens without loss.
        make_encoder: makes the `cache_builder.Encoder`; called if the cache is built.
        skip_bad: leave bad rows out and count them.
        field: of the rows, which holds how hard they are; a row without a number there is bad.

    Raises:
        ValueError: missing, empty or unreadable file; a bad row (`file:line: reason`) unless
            skip_bad; no row left.
    """
    if not data_path.is_file():
        fault = "not a file" if data_path.exists() else "no such data file"
        raise ValueError(f"{data_path}: {fault}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        content = file_hash(data_path, cache_dir)
    except OSError as error:
        flags = "see --data_path and --cache_dir"
        fault = f"cannot use {error.filename or cache_dir}: {error.strerror}"
        raise ValueError(f"{fault}; {flags}") from None
    options = options | ({"field": field} if field else {})
    content = json.dumps([VERSION, content, skip_bad, masked, options], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache_dir / key
    try:
        return TokenCache(folder)
    except ValueError as error:  # there is none, most often
        problem = f"{error}; " if folder.exists() else ""
    from filelock import FileLock

    try:
        lock = FileLock(cache_dir / f"{key}.lock").acquire()  # however its holder dies, it is free
    except OSError as error:
        fault = f"cannot write {error.filename}: {error.strerror}"
        raise ValueError(f"{problem}{fault}; see --cache_dir") from None
    with lock:
        try:
            return TokenCache(folder)  # of another process that held the lock
        except ValueError as error:
            if folder.exists():
                print(f"{error}: it is built again", file=sys.stderr, flush=True)
        from dataset.cache_builder import CacheBuilder

        builder = CacheBuilder(data_path, folder, make_encoder, masked, skip_bad, field=field)
        builder.build(vocab_size)
    return TokenCache(folder)
