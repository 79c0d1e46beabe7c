"""Rows of a data file: JSON lines, one JSON array, or plain text with a document a line."""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
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
    # To open a pipe would wait for whoever writes to it.
    with open(path if path.is_file() else os.devnull, "rb") as file:
        head = file.read(HEAD)
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        if path.suffix not in (".txt", ".csv", ".tsv") and are_json_lines(head):
            yield from read_lines(file, path, json.loads)
            return
        from dataset.file_kinds import check_kind

        is_text = path.suffix == ".txt"
        check_kind(path, "lines" if is_text else "rows")
        if not is_text and head.removeprefix(codecs.BOM_UTF8)[:256].lstrip().startswith(b"["):
            from dataset.read_array import read_array

            yield from read_array(file, path)
        else:
            yield from read_lines(file, path, str if is_text else json.loads)


def are_json_lines(head: bytes) -> bool:
    """Whether a file that begins so is text, and its first line a JSON object; False: look closer."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut off
    except UnicodeDecodeError:
        return False
    is_binary = re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head)
    return not is_binary and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")


def read_lines(
    file: BinaryIO, path: Path, parse: Callable[[str], object]
) -> Iterator[tuple[Row, int]]:
    """The rows from here on, as `read_rows` yields them; parse: makes one of the text of a line."""
    line, at, advice = 0, file.tell(), ""
    while raw := file.readline(checks.MAX_ROW_BYTES + 1):
        line, begin, at = line + 1, at, at + len(raw)
        row, fault = None, ""
        if len(raw) > checks.MAX_ROW_BYTES:
            from dataset.row_faults import skip_line

            fault = skip_line(file, raw, checks.MAX_ROW_BYTES)
            at = file.tell()
        elif not (raw := raw.strip(b" \t\r\n")):
            continue
        else:
            try:
                text = raw.decode("utf-8")
                row = parse(text)
                fault = checks.lone_surrogate(row, text)
            except (ValueError, RecursionError) as error:
                from dataset.row_faults import explain_line

                fault, advice = explain_line(error, path, begin, advice)
        yield (line, row, fault), at
