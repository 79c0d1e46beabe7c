"""What all datasets have: a row of a file -> (X, Y, loss_mask) to train on.

X and Y are int64 and loss_mask is int64 0/1, 1-D, of equal length T <= max_length, unpadded and
shifted by one: Y[t] is the token that follows X[t], and loss_mask[t] says whether predicting it
counts. Tokenising happens once, into a cache (`token_cache.py`); what a row becomes is decided by an
encoder, which is loaded only for that.
"""

import functools
import json
import mmap
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.token_cache import cache_key, describe_tokenizer, has_cache

ROOT = Path(__file__).resolve().parents[1]
CACHE_DIR = ROOT / "out" / "cache"
DROP_PAGES_EVERY = 1 << 9  # rows read between two releases of the mapped pages; each can map 64 KB


class CachedDataset(Dataset):
    """Rows of a token cache as training samples.

    Args:
        tokenizer: a fast tokenizer, as `AutoTokenizer.from_pretrained` gives it.
        options: what else the samples depend on.
        make_encoder: makes the `cache_builder.Encoder`; called if the cache is built.
        masked: whether there are tokens without loss.
        cache_dir: where token caches live; default: out/cache.
        skip_bad: leave bad rows out and count them, instead of stopping at the first one.
        curriculum: what says how hard a row is: its 'length', or 'field:NAME', a number in it; or
            'none'.

    Attributes:
        folder: the cache.
        key: hash of data, tokenizer and options, the identity of the data in checkpoints.
        lengths: (rows,) int64, T of each row, so that batches can be planned without reading a row.
        supervised: (rows,) int64, tokens with loss of each row.
        difficulty: (rows,) numbers by which an epoch is ordered; None without a curriculum.
        stats: counts of the file: rows, tokens, supervised, dropped, truncated, bad, first_bad.

    Raises:
        ValueError: `file:line: reason` of a bad row; a missing or empty file; no usable row.
    """

    def __init__(
        self,
        data_path,
        tokenizer,
        options: dict,
        make_encoder: Callable,
        masked: bool,
        cache_dir,
        skip_bad: bool,
        curriculum: str,
    ):
        path, cache_dir = Path(data_path), Path(cache_dir or CACHE_DIR)
        text, template = describe_tokenizer(tokenizer, cache_dir)
        options = options | {"tokenizer": text, "stage": type(self).__name__}
        if masked:  # a conversation
            options["chat_template"] = template
        field = curriculum.removeprefix("field:") if curriculum.startswith("field:") else None
        if field:
            from dataset.curriculum import RatedEncoder

            options["field"] = field
            make_encoder = functools.partial(RatedEncoder, make_encoder, field)
        self.key = cache_key(path, cache_dir, [skip_bad, masked, options])
        self.folder = cache_dir / self.key
        if not has_cache(self.folder):
            from dataset.cache_builder import CacheBuilder

            settings = (len(tokenizer), masked, skip_bad, field)
            CacheBuilder(path, self.folder, make_encoder, *settings).build()
        meta = json.loads((self.folder / "meta.json").read_text())
        self.stats, self.masked, self.dtype = meta["stats"], masked, np.dtype(meta["dtype"])
        lengths = np.load(self.folder / "lengths.npy").astype(np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.lengths = lengths - 1  # the last token of a row is only predicted
        self.supervised = np.load(self.folder / "supervised.npy").astype(np.int64)
        self.difficulty = np.load(self.folder / "difficulty.npy") if field else None
        if curriculum == "length":
            self.difficulty = self.lengths
        has_checksums = "checksums" in meta  # an older cache has none
        self.checksums = np.load(self.folder / "checksums.npy") if has_checksums else None
        self.maps: dict[str, mmap.mmap] = {}  # opened on first use, in every worker process anew
        self.reads = 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "maps": {}}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = map(torch.from_numpy, self.read_row(row))
        return ids[:-1], ids[1:], mask[1:].long()

    def read_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A row of the cache as ids (n,) int64 and mask (n,) uint8, which says what carries loss."""
        self.reads += 1
        if self.reads % DROP_PAGES_EVERY == 0:  # mapped pages count as memory of this process
            for mapped in self.maps.values() if hasattr(mmap, "MADV_DONTNEED") else ():
                mapped.madvise(mmap.MADV_DONTNEED)
        ids = self._read("tokens.bin", self.dtype, row)
        if self.masked:
            mask = self._read("mask.bin", np.dtype(np.uint8), row).copy()
        else:
            mask = np.ones(len(ids), np.uint8)
        sums = [zlib.crc32(ids), zlib.crc32(mask)]
        if self.checksums is not None and sums != self.checksums[row].tolist():
            from dataset.cache_checks import altered_row

            raise altered_row(self.folder, row, sums[0] == self.checksums[row, 0])
        return ids.astype(np.int64), mask

    def _read(self, name: str, dtype: np.dtype, row: int) -> np.ndarray:
        if name not in self.maps:
            with open(self.folder / name, "rb") as file:
                self.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin, end = int(self.starts[row]), int(self.starts[row + 1])
        return np.frombuffer(self.maps[name], dtype, end - begin, begin * dtype.itemsize)

    @staticmethod
    def collate(
        samples: list[tuple[Tensor, Tensor, Tensor]],
        part: int = 0,
        parts: int = 1,
        multiple: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Pack the samples of a micro-batch into one row, without padding.

        Args:
            part, parts, multiple: where processes share a row, see `row_parts.collate_part`.

        Returns:
            X, Y, loss_mask: (1, N / parts) int64 each.
            doc_lens: lengths of the samples, the same for all parts; [] for no sample at all.
        """
        lens = [len(sample[0]) for sample in samples]
        if multiple > 1 or not samples:
            from dataset.row_parts import collate_part

            return *collate_part(samples, part, parts, multiple), lens
        X, Y, loss_mask = (torch.cat(rows).unsqueeze(0) for rows in zip(*samples, strict=True))
        return X, Y, loss_mask, lens


def describe(dataset: CachedDataset) -> str:
    """One line of counts: rows, tokens, supervised share, dropped, truncated and bad rows."""
    stats = dataset.stats
    share = stats["supervised"] / max(1, stats["tokens"])
    text = (
        f"{stats['rows']:,} rows, {stats['tokens']:,} tokens, {stats['supervised']:,} supervised "
        f"({share:.1%}), {stats['dropped']:,} dropped, {stats['truncated']:,} truncated"
    )
    if stats["bad"]:
        text += f", {stats['bad']:,} bad rows skipped (first: {stats['first_bad']})"
    return text
