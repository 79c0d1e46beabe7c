"""Rows of a data file: JSON lines, one JSON array, or plain text with a document a line."""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset import checks

Row = tuple[int, object, str]  # line number, the parsed row, what is wrong with it ("": nothing)

HEAD = 1 << 16  # bytes that show what a file is


def read_rows(path: Path) -> Iterator[tuple[Row, int]]:
    """Yield ((line, row, fault), bytes read so far); BOM and CRLF are fine.

    A row is parsed JSON, or a str for `.txt`.

    Raises:
        ValueError: the file is of another kind (`file: what it is, how to convert it`); a JSON
            array that cannot be read on (`file:line: reason`).
    """
    is_text = path.suffix == ".txt"
    # To open a pipe would wait for whoever writes to it.
    with open(path if path.is_file() else os.devnull, "rb") as file:
        head = file.read(HEAD)
    if not head or not is_as_expected(head, is_text) or path.suffix in (".csv", ".tsv"):
        from dataset.file_kinds import check_kind

        check_kind(path, "lines" if is_text else "rows")
    with open(path, "rb") as file:
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        start = file.tell()
        if not is_text and file.read(256).lstrip()[:1] == b"[":
            from dataset.read_array import read_array

            file.seek(start)
            yield from read_array(file, path)
        else:
            file.seek(start)
            yield from read_lines(file, path)


def is_as_expected(head: bytes, is_text: bool) -> bool:
    """Whether a file begins as JSON, or is_text: as what is no JSON; False: look closer."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut off
    except UnicodeDecodeError:
        return False
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return False
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return first not in b"{[v<" if is_text else first in (b"{", b"[")  # v: Git LFS, <: HTML


def read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[Row, int]]:
    line, at, advice = 0, file.tell(), ""
    while raw := file.readline(checks.MAX_ROW_BYTES + 1):
        line += 1
        begin = at
        at += len(raw)
        if len(raw) > checks.MAX_ROW_BYTES:
            size = len(raw)
            while raw and not raw.endswith(b"\n"):  # skip the rest of it without holding it
                raw = file.readline(checks.MAX_ROW_BYTES)
                size += len(raw)
            at += size - checks.MAX_ROW_BYTES - 1
            from dataset.row_faults import too_long

            yield (line, None, too_long(size, checks.MAX_ROW_BYTES)), at
            continue
        if not (raw := raw.strip(b" \t\r\n")):
            continue
        row, fault = None, ""
        try:
            text = raw.decode("utf-8")
            if path.suffix == ".txt":
                row = text
            else:
                row = json.loads(text)
                fault = checks.lone_surrogate(row, text)
        except UnicodeDecodeError as error:
            from dataset.file_kinds import not_utf8

            advice = advice or not_utf8(path, begin)  # of the first such line, for all of them
            bad = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            fault = f"{bad} is not UTF-8; {advice}"
        except json.JSONDecodeError as error:
            fault = f"broken JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:
            fault = str(error)
        yield (line, row, fault), at
