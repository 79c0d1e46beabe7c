"""Build a token cache: read the rows of a file, encode them chunk by chunk, write arrays."""

import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.cache_files import Source
from dataset.checksums import array_checksum, dict_checksum
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


class CacheBuilder:
    """One build of the cache `folder`, whose name is its key; the caller holds the lock."""

    def __init__(self, source: Source, folder: Path):
        self.source, self.folder = source, folder
        self.building = folder.with_name(f"{folder.name}.building")
        self.dtype = np.dtype(np.uint16 if source.vocab_size <= 1 << 16 else np.uint32)
        self.stats = dict.fromkeys(("rows", "tokens", "supervised"), 0)
        self.stats |= {"dropped": 0, "truncated": 0, "bad": 0, "first_bad": ""}
        # Of all rows, see `TokenCache`
        self.lengths, self.supervised = array("i"), array("i")
        self.checksums, self.difficulty = array("I"), array("d")

    def build(self) -> None:
        """Encode all rows into a folder beside `folder`, then rename it.

        Raises:
            ValueError: a bad row, unless they are skipped; no row left; a full disk.
        """
        shutil.rmtree(self.building, ignore_errors=True)  # of a build that was killed
        try:
            self.building.mkdir()
            self.write_tokens()
            self.write_arrays()
            self.publish()
        except OSError as error:
            from dataset.cache_faults import unwritable

            raise unwritable(error, self.building) from None
        finally:
            shutil.rmtree(self.building, ignore_errors=True)

    def write_tokens(self) -> None:
        encoder, path = None, self.source.data_path
        chunks = read_chunks(path)
        if path.stat().st_size > CHUNK_BYTES:
            from dataset.progress import show_bytes

            chunks = show_bytes(chunks, path.stat().st_size, f"tokenising {path.name}")
        with (
            open(self.building / "tokens.bin", "wb") as tokens_file,
            open(self.building / "mask.bin", "wb") as mask_file,
        ):
            for chunk, _ in chunks:
                encoder = encoder or self.source.make_encoder()
                for ids, mask in self.encode_rows(encoder, chunk):
                    ids, mask = np.array(ids, self.dtype), bytes(mask)
                    tokens_file.write(ids)  # tofile would not say why it failed
                    mask_file.write(mask if self.source.masked else b"")
                    self.lengths.append(len(ids))
                    self.supervised.append(mask.count(1) - mask[0])  # the first is never predicted
                    self.checksums.extend((zlib.crc32(ids), zlib.crc32(mask)))

    def encode_rows(
        self, encoder: Encoder, chunk: list[Row]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The pieces (ids, mask) of a chunk's good rows; counts, and reports the first bad one."""
        parsed, difficulties = [], []
        for line, row, fault in chunk:
            try:
                if fault:
                    raise ValueError(fault)
                item, difficulty = encoder.parse(row), 0.0
                if self.source.field:
                    from dataset.curriculum import read_difficulty

                    difficulty = read_difficulty(row, self.source.field)
            except (ValueError, RecursionError) as error:
                if not self.source.skip_bad:
                    raise ValueError(f"{self.source.data_path}:{line}: {error}") from None
                self.stats["bad"] += 1
                self.stats["first_bad"] = self.stats["first_bad"] or f"line {line}: {error}"
                continue
            parsed.append(item)
            difficulties.append(difficulty)
        for (pieces, truncated), difficulty in zip(
            encoder.encode(parsed), difficulties, strict=True
        ):
            self.stats["dropped"] += not pieces
            self.stats["truncated"] += truncated
            self.difficulty.extend([difficulty] * len(pieces))
            yield from pieces

    def write_arrays(self) -> None:
        if not self.lengths:
            from dataset.cache_faults import no_usable_row

            raise no_usable_row(self.source.data_path, self.stats)
        self.stats["rows"] = len(self.lengths)
        self.stats["tokens"] = sum(self.lengths) - len(self.lengths)
        self.stats["supervised"] = sum(self.supervised)
        arrays = {
            "lengths.npy": np.array(self.lengths, np.int32),
            "supervised.npy": np.array(self.supervised, np.int32),
            "checksums.npy": np.array(self.checksums, np.uint32).reshape(-1, 2),
        }
        meta = {"key": self.folder.name, "dtype": self.dtype.name, "masked": self.source.masked}
        meta |= {"source": self.source.data_path.name, "stats": self.stats}
        if self.source.field:
            meta["field"] = self.source.field
            arrays["difficulty.npy"] = np.array(self.difficulty, np.float64)
        for name, values in arrays.items():
            np.save(self.building / name, values)
        meta["checksums"] = {name: array_checksum(values) for name, values in arrays.items()}
        meta["checksum"] = dict_checksum(meta)
        (self.building / "meta.json").write_text(json.dumps(meta))

    def publish(self) -> None:
        """Put all files on the disk before the name that vouches for them is there."""
        for path in self.building.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if self.folder.exists():  # a damaged one
            shutil.rmtree(self.folder)
        os.replace(self.building, self.folder)


def read_chunks(path: Path) -> Iterator[tuple[list[Row], int]]:
    """The rows of a file, about CHUNK_BYTES of text at a time, and the bytes that they took."""
    chunk, begin = [], 0
    for row, at in read_rows(path):
        chunk.append(row)
        if at - begin >= CHUNK_BYTES:
            yield chunk, at - begin
            chunk, begin = [], at
    yield chunk, path.stat().st_size - begin
