"""Build a token cache: read the rows of a file, encode them chunk by chunk, write arrays."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.checksums import array_checksum, dict_checksum
from dataset.progress import byte_bar
from dataset.read_rows import Row, read_rows

CHUNK_BYTES = 1 << 20  # text encoded in one call: enough for all cores, little memory


class Encoder(Protocol):
    """What turns the rows of a file into tokens, a chunk of them at a time."""

    def parse(self, row: object) -> object:
        """A row as `encode` takes it. ValueError: what is wrong with it."""

    def encode(self, parsed: list) -> list[tuple[list[tuple[list[int], list[int]]], bool]]:
        """For each row its pieces [(ids, mask), ...], and whether it was truncated.

        A row without pieces is dropped and counted.
        """


@dataclass
class CacheBuilder:
    """One build of the cache `folder`, whose name is its key; the caller holds the lock.

    The other arguments are those of `token_cache.open_cache`.
    """

    data_path: Path
    folder: Path
    make_encoder: Callable[[], Encoder]
    masked: bool
    skip_bad: bool
    field: str | None

    def __post_init__(self) -> None:
        self.building = self.folder.with_name(f"{self.folder.name}.building")
        self.damaged = self.folder.with_name(f"{self.folder.name}.damaged")
        self.encoder: Encoder | None = None
        self.stats = dict.fromkeys(("rows", "tokens", "supervised"), 0)
        self.stats |= {"dropped": 0, "truncated": 0, "bad": 0, "first_bad": ""}
        # For each chunk an array of its rows, see `TokenCache`
        self.lengths = [np.zeros(0, np.int32)]
        self.supervised = [np.zeros(0, np.int32)]
        self.checksums = [np.zeros((0, 2), np.uint32)]
        self.difficulty = [np.zeros(0, np.float64)]

    def build(self, vocab_size: int) -> None:
        """Encode all rows into a folder beside `folder`, then rename it.

        Raises:
            ValueError: a bad row, unless they are skipped; no row left; a full disk.
        """
        self.remove_leftovers()  # of a build that was killed
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        try:
            self.building.mkdir()
            self.write_tokens()
            self.write_arrays()
            self.publish()
        except OSError as error:
            fault = f"{error.filename or self.building}: {error.strerror or error}"
            advice = "the token cache needs about the size of the data"
            raise ValueError(f"{fault}; {advice}") from None
        finally:
            self.remove_leftovers()

    def remove_leftovers(self) -> None:
        shutil.rmtree(self.building, ignore_errors=True)
        shutil.rmtree(self.damaged, ignore_errors=True)

    def write_tokens(self) -> None:
        size = self.data_path.stat().st_size
        with (
            open(self.building / "tokens.bin", "wb") as self.tokens_file,
            open(self.building / "mask.bin", "wb") as self.mask_file,
            byte_bar(size, f"tokenising {self.data_path.name}") as bar,
        ):
            chunk, begin = [], 0
            for row, at in read_rows(self.data_path):
                chunk.append(row)
                if at - begin >= CHUNK_BYTES:
                    self.write_chunk(chunk)
                    bar.update(at - begin)
                    chunk, begin = [], at
            self.write_chunk(chunk)
            bar.update(size - begin)

    def write_chunk(self, chunk: list[Row]) -> None:
        self.encoder = self.encoder or self.make_encoder()
        parsed, difficulties = self.parse_rows(chunk)
        ids, mask, lengths, supervised, difficulty = [], [], [], [], []
        encoded = self.encoder.encode(parsed)
        for (pieces, truncated), number in zip(encoded, difficulties, strict=True):
            self.stats["dropped"] += not pieces
            self.stats["truncated"] += truncated
            difficulty += [number] * len(pieces)
            for row_ids, row_mask in pieces:
                ids += row_ids
                mask += row_mask
                lengths.append(len(row_ids))
                supervised.append(row_mask.count(1) - row_mask[0])  # the first is never predicted
        ids, mask = np.array(ids, self.dtype), np.array(mask, np.uint8)
        self.tokens_file.write(ids)  # tofile would not say why it failed
        if self.masked:
            self.mask_file.write(mask)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        spans = [slice(*span) for span in zip([0, *ends], ends, strict=False)]
        sums = [(zlib.crc32(ids[span]), zlib.crc32(mask[span])) for span in spans]
        self.checksums.append(np.array(sums, np.uint32).reshape(-1, 2))
        self.lengths.append(np.array(lengths, np.int32))
        self.supervised.append(np.array(supervised, np.int32))
        self.difficulty.append(np.array(difficulty, np.float64))

    def parse_rows(self, chunk: list[Row]) -> tuple[list, list[float]]:
        """The good rows of a chunk, and how hard each is; the first bad one is reported."""
        parsed, difficulties = [], []
        for line, row, fault in chunk:
            try:
                if fault:
                    raise ValueError(fault)
                item, number = self.encoder.parse(row), 0.0
                if self.field:
                    from dataset.curriculum import read_difficulty

                    number = read_difficulty(row, self.field)
            except (ValueError, RecursionError) as error:
                if not self.skip_bad:
                    raise ValueError(f"{self.data_path}:{line}: {error}") from None
                self.stats["bad"] += 1
                self.stats["first_bad"] = self.stats["first_bad"] or f"line {line}: {error}"
                continue
            parsed.append(item)
            difficulties.append(number)
        return parsed, difficulties

    def write_arrays(self) -> None:
        arrays = {
            "lengths.npy": np.concatenate(self.lengths),
            "supervised.npy": np.concatenate(self.supervised),
            "checksums.npy": np.concatenate(self.checksums),
        }
        if self.field:
            arrays["difficulty.npy"] = np.concatenate(self.difficulty)
        self.count_rows(arrays["lengths.npy"], arrays["supervised.npy"])
        meta = {
            "key": self.folder.name,
            "dtype": self.dtype.name,
            "masked": self.masked,
            "source": self.data_path.name,
            "stats": self.stats,
        }
        if self.field:
            meta["field"] = self.field
        for name, array in arrays.items():
            np.save(self.building / name, array)
        meta["checksums"] = {name: array_checksum(array) for name, array in arrays.items()}
        meta["checksum"] = dict_checksum(meta)
        (self.building / "meta.json").write_text(json.dumps(meta))

    def count_rows(self, lengths: np.ndarray, supervised: np.ndarray) -> None:
        stats, rows = self.stats, len(lengths)
        if rows + stats["dropped"] + stats["bad"] == 0:
            raise ValueError(f"{self.data_path}: the file is empty")
        if rows == 0:
            dropped = f"{stats['dropped']} without a supervised token within max_seq_len"
            fault = f"no usable row: {stats['bad']} bad, {dropped}; see --max_seq_len."
            raise ValueError(f"{self.data_path}: {fault} {stats['first_bad']}".rstrip())
        stats["rows"] = rows
        stats["tokens"] = int(lengths.sum(dtype=np.int64)) - rows
        stats["supervised"] = int(supervised.sum(dtype=np.int64))

    def publish(self) -> None:
        """Put all files on the disk before the name that vouches for them is there."""
        for path in self.building.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if self.folder.exists():  # a damaged one: a folder replaces none that has files
            os.rename(self.folder, self.damaged)
        os.replace(self.building, self.folder)
