"""Rows of a JSON array, without holding the array."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset import checks

BLOCK = 1 << 20  # bytes read at a time


def read_array(file: BinaryIO, path: Path) -> Iterator[tuple[tuple, int]]:
    """The elements of the array, as `read_rows.read_rows` yields them."""
    return ArrayReader(file, path).rows()


class ArrayReader:
    """What is read of an array and not parsed yet.

    Attributes:
        text: decoded, to parse from `at` on.
        line: of text[at], counted from 1.
        rest: bytes behind `text`, of a character that the last block cut in two.
        is_end: whether the file ends behind `text`.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.text, self.at, self.line = "", 0, 1
        self.rest = b""
        self.is_end = False
        self.is_open = False  # the [ that begins the array was read

    def rows(self) -> Iterator[tuple[tuple, int]]:
        decoder = json.JSONDecoder()
        while True:
            self.read_block()
            while True:
                self.skip_separators()
                if self.text.startswith("]", self.at):
                    return self.check_nothing_follows()
                try:
                    row, end = decoder.raw_decode(self.text, self.at)
                except (ValueError, RecursionError) as error:
                    left = len(self.text) - self.at
                    if not self.is_end and left <= checks.MAX_ROW_BYTES:
                        break  # perhaps only cut off: read on
                    raise self.explain(error) from None
                # A number could go on in the next block; an object, a string or an array not.
                is_complete = isinstance(row, dict | str | list) or self.is_end
                if end == len(self.text) and not is_complete:
                    break
                fault = checks.lone_surrogate(row, self.text[self.at : end])
                yield (self.line, row, fault), self.file.tell()
                self.line += self.text.count("\n", self.at, end)
                self.at = end

    def read_block(self) -> None:
        block = self.file.read(BLOCK)
        self.is_end = not block
        raw = self.rest + block
        cut = len(raw) if self.is_end else whole_characters(raw)
        raw, self.rest = raw[:cut], raw[cut:]
        try:
            self.text, self.at = self.text[self.at :] + raw.decode("utf-8"), 0
        except UnicodeDecodeError as error:
            from dataset.file_kinds import not_utf8

            line = self.line + self.text.count("\n", self.at) + raw.count(b"\n", 0, error.start)
            offset = self.file.tell() - len(self.rest) - len(raw) + error.start
            bad = f"byte 0x{raw[error.start]:02x} at offset {offset}"
            fault = f"{bad} is not UTF-8; {not_utf8(self.path, offset)}"
            raise ValueError(f"{self.path}:{line}: {fault}") from None

    def skip_separators(self) -> None:
        begin, text = self.at, self.text
        while self.at < len(text) and text[self.at] in " \t\r\n,[":
            if text[self.at] == "[":
                if self.is_open:  # of a row that is an array
                    break
                self.is_open = True
            self.at += 1
        self.line += text.count("\n", begin, self.at)

    def check_nothing_follows(self) -> None:
        behind = (self.text[self.at + 1 :].encode() + self.rest).strip()
        while not behind and (block := self.file.read(BLOCK)):
            behind = block.strip()
        if behind:
            fault = "broken JSON: text behind the end of the array"
            raise ValueError(f"{self.path}:{self.line}: {fault}")

    def explain(self, error: Exception) -> ValueError:
        """Why there is no row at text[at]."""
        left, line = len(self.text) - self.at, self.line
        if left > checks.MAX_ROW_BYTES:
            from dataset.row_faults import too_long

            fault = f"{too_long(left, checks.MAX_ROW_BYTES)}, or broken JSON"
        elif left <= 0:
            fault = "broken JSON: the array does not end with ]"
        else:
            line += self.text.count("\n", self.at, getattr(error, "pos", self.at))
            fault = f"broken JSON: {getattr(error, 'msg', error)}"
        return ValueError(f"{self.path}:{line}: {fault}")


def whole_characters(raw: bytes) -> int:
    """How many bytes lie before a character of UTF-8 that is cut off at the end."""
    cut = len(raw)
    while cut and cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    if cut and raw[cut - 1] >= 0xC0:
        cut -= 1
    return cut
