"""A token cache: what it is made from, and what is read of it."""

import json
import mmap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DROP_PAGES_EVERY = 1 << 9  # rows read between two releases of the mapped pages; each can map 64 KB


@dataclass
class Source:
    """What a token cache is made from."""

    data_path: Path
    make_encoder: Callable  # makes the `cache_builder.Encoder`; called if the cache is built
    vocab_size: int  # of the tokenizer; decides the width of the stored ids
    masked: bool  # whether there are tokens without loss
    skip_bad: bool  # leave bad rows out and count them
    field: str | None = None  # says how hard a row is; a row without a number there is bad


class TokenCache:
    """A complete cache, open for reading.

    Attributes:
        key: hash of content, tokenizer and options, the same wherever the file lies.
        lengths: (rows,) int32, tokens of each row including the one that is only predicted.
        supervised: (rows,) int32, tokens of each row that carry loss.
        difficulty: (rows,) float64, the field of the curriculum; None without one.
        checksums: (rows, 2) uint32, CRC-32 of each row's tokens and mask; None in an older cache.
        stats: counts: rows, tokens, supervised, dropped, truncated, bad, first_bad.
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / "meta.json").read_text())
        self.folder, self.key, self.stats = folder, meta["key"], meta["stats"]
        self.dtype, self.masked = np.dtype(meta["dtype"]), meta["masked"]
        self.lengths = np.load(folder / "lengths.npy")
        self.supervised = np.load(folder / "supervised.npy")
        self.difficulty = np.load(folder / "difficulty.npy") if meta.get("field") else None
        self.checksums = np.load(folder / "checksums.npy") if "checksums" in meta else None
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.maps: dict[str, mmap.mmap] = {}  # opened on first use, in every worker process anew
        self.reads = 0

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
        ids = self._read("tokens.bin", self.dtype, row)
        mask = np.ones(len(ids), np.uint8)
        if self.masked:
            mask = self._read("mask.bin", mask.dtype, row).copy()
        if self.checksums is None:  # of an older cache the mask alone can be checked
            is_intact = np.count_nonzero(mask[1:]) == self.supervised[row]
        else:
            is_intact = self.checksums[row].tolist() == [zlib.crc32(ids), zlib.crc32(mask)]
        if not is_intact:
            from dataset.cache_checks import altered_row

            raise altered_row(self, row, ids)
        return ids.astype(np.int64), mask
