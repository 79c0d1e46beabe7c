"""Build a token cache: read the rows of a file, encode them chunk by chunk, write arrays."""

import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.checksums import array_checksum, dict_checksum
from dataset.read_rows import Row, read_rows
from dataset.token_cache import has_cache

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
    """One build of a token cache."""

    data_path: Path
    folder: Path  # of the cache; its name is the key
    make_encoder: Callable[[], Encoder]
    vocab_size: int  # of the tokenizer; decides the width of the stored ids
    masked: bool  # whether there are tokens without loss
    skip_bad: bool  # leave bad rows out and count them
    field: str | None = None  # says how hard a row is: the encoder is a `curriculum.RatedEncoder`

    def __post_init__(self) -> None:
        self.building = Path(f"{self.folder}.building")
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.counts = {"dropped": 0, "truncated": 0, "bad": 0, "first_bad": ""}
        self.encoder: Encoder | None = None
        # Of each row: its tokens, those with loss, CRC-32 of its tokens and of its mask
        self.lengths, self.supervised, self.checksums = array("i"), array("i"), array("I")

    def build(self) -> None:
        """Encode all rows into a folder beside `folder`, then rename it, unless another did so.

        Raises:
            ValueError: a bad row, unless they are skipped; no row left; a full disk.
        """
        from filelock import FileLock

        try:
            with FileLock(f"{self.folder}.lock"):  # however its holder dies, it is free
                if not has_cache(self.folder, report=True):
                    self.write_folder()
        except OSError as error:
            from dataset.cache_faults import unwritable

            raise unwritable(error, self.folder) from None

    def write_folder(self) -> None:
        """Put all files on the disk before the name that vouches for them is there."""
        shutil.rmtree(self.building, ignore_errors=True)  # of a build that was killed
        try:
            self.building.mkdir()
            self.write_tokens()
            self.write_arrays()
            for path in self.building.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            if self.folder.exists():  # a damaged one
                shutil.rmtree(self.folder)
            os.replace(self.building, self.folder)
        finally:
            shutil.rmtree(self.building, ignore_errors=True)

    def write_tokens(self) -> None:
        chunks = read_chunks(self.data_path)
        if (size := self.data_path.stat().st_size) > CHUNK_BYTES:
            from dataset.progress import show_bytes

            chunks = show_bytes(chunks, size, f"tokenising {self.data_path.name}")
        with (
            open(self.building / "tokens.bin", "wb") as tokens_file,
            open(self.building / "mask.bin", "wb") as mask_file,
        ):
            for chunk, _ in chunks:
                for ids, mask in self.encode_rows(chunk):
                    ids, mask = np.array(ids, self.dtype), bytes(mask)
                    tokens_file.write(ids)  # tofile would not say why it failed
                    mask_file.write(mask if self.masked else b"")
                    self.lengths.append(len(ids))
                    self.supervised.append(mask.count(1) - mask[0])  # the first is never predicted
                    self.checksums.extend((zlib.crc32(ids), zlib.crc32(mask)))

    def encode_rows(self, chunk: list[Row]) -> Iterator[tuple[list[int], list[int]]]:
        """The pieces (ids, mask) of a chunk's good rows; counts, and reports the first bad one."""
        self.encoder = self.encoder or self.make_encoder()  # loads the tokenizer
        parsed = []
        for line, row, fault in chunk:
            try:
                if fault:
                    raise ValueError(fault)
                parsed.append(self.encoder.parse(row))
            except (ValueError, RecursionError) as error:
                if not self.skip_bad:
                    raise ValueError(f"{self.data_path}:{line}: {error}") from None
                self.counts["bad"] += 1
                self.counts["first_bad"] = self.counts["first_bad"] or f"line {line}: {error}"
        for pieces, truncated in self.encoder.encode(parsed):
            self.counts["dropped"] += not pieces
            self.counts["truncated"] += truncated
            yield from pieces

    def write_arrays(self) -> None:
        if not self.lengths:
            from dataset.cache_faults import no_usable_row

            raise no_usable_row(self.data_path, self.counts)
        tokens = sum(self.lengths) - len(self.lengths)
        stats = {"rows": len(self.lengths), "tokens": tokens, "supervised": sum(self.supervised)}
        arrays = {
            "lengths.npy": np.array(self.lengths, np.int32),
            "supervised.npy": np.array(self.supervised, np.int32),
            "checksums.npy": np.array(self.checksums, np.uint32).reshape(-1, 2),
        }
        meta = {"key": self.folder.name, "dtype": self.dtype.name, "masked": self.masked}
        meta |= {"source": self.data_path.name, "stats": stats | self.counts}
        if self.field:
            meta["field"] = self.field
            arrays["difficulty.npy"] = np.array(getattr(self.encoder, "difficulty", ()))
        for name, values in arrays.items():
            np.save(self.building / name, values)
        meta["checksums"] = {name: array_checksum(values) for name, values in arrays.items()}
        meta["checksum"] = dict_checksum(meta)
        (self.building / "meta.json").write_text(json.dumps(meta))


def read_chunks(path: Path) -> Iterator[tuple[list[Row], int]]:
    """The rows of a file, about CHUNK_BYTES of text at a time, and the bytes that they took."""
    chunk, begin = [], 0
    for row, at in read_rows(path):
        chunk.append(row)
        if at - begin >= CHUNK_BYTES:
            yield chunk, at - begin
            chunk, begin = [], at
    yield chunk, path.stat().st_size - begin
