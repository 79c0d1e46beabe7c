"""Rows of a data file, one at a time: JSON lines, one JSON array, or plain text with a document a
line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dataset.file_kinds import check_kind, not_utf8

MAX_ROW_BYTES = (
    8 << 20
)  # a longer row is a mistake in the data; encoding it would cost gigabytes of memory
BLOCK = 1 << 20  # bytes read at a time from a JSON array

Row = tuple[
    int, object, str
]  # line number, the parsed row, what is wrong with it ("" when nothing is)


def read_rows(path: Path) -> Iterator[tuple[Row, int]]:
    """Yield ((line, row, fault), bytes read so far). A row is parsed JSON, or a str for `.txt`. BOM
    and CRLF are fine.

    Raises:
        ValueError: the file is of another kind (`file: what it is, how to convert it`); a JSON
        array that cannot be
            read on (`file:line: reason`).
    """
    check_kind(path, "lines" if path.suffix == ".txt" else "rows")
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        start = file.tell()
        if path.suffix != ".txt" and file.read(256).lstrip()[:1] == b"[":
            file.seek(start)
            yield from read_array(file, path)
        else:
            file.seek(start)
            yield from read_lines(file, path)


def too_long(size: int) -> str:
    return (
        f"row of more than {size / 2**20:.0f} MB, the limit is {MAX_ROW_BYTES >> 20} MB; split it"
    )


def lone_surrogate(row: object, text: str) -> str:
    """What is wrong with a row that spells half a character: no encoding can hold it, whatever is
    made of the row.

    Args:
        row: what JSON made of `text`; a str of UTF-8 is fine.
    """
    if "\\ud" not in text and "\\uD" not in text or isinstance(row, str) and row == text:
        return ""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return (
            f"a lone surrogate \\u{ord(error.object[error.start]):04x} in it, which is half a"
            " character and no text"
        )
    return ""


def read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[Row, int]]:
    line, at, advice = 0, file.tell(), ""
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        begin = at
        at += len(raw)
        if len(raw) > MAX_ROW_BYTES:
            size = len(raw)
            while raw and not raw.endswith(b"\n"):  # skip the rest of it without holding it
                raw = file.readline(MAX_ROW_BYTES)
                size += len(raw)
            at += size - MAX_ROW_BYTES - 1
            yield (line, None, too_long(size)), at
            continue
        if not (raw := raw.strip(b" \t\r\n")):
            continue
        try:
            text = raw.decode("utf-8")
            row = text if path.suffix == ".txt" else json.loads(text)
            fault = lone_surrogate(row, text)
        except UnicodeDecodeError as error:
            advice = advice or not_utf8(path, begin)  # of the first such line, for all of them
            bad = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            row, fault = None, f"{bad} is not UTF-8; {advice}"
        except json.JSONDecodeError as error:
            row, fault = None, f"broken JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:
            row, fault = None, str(error)
        yield (line, row, fault), at


def read_array(file: BinaryIO, path: Path) -> Iterator[tuple[Row, int]]:
    """The elements of a JSON array, without holding the array."""
    text, at, line = "", 0, 1  # text still to parse from `at` on; `line` is the line of text[at]
    rest, decoder, opened = b"", json.JSONDecoder(), False
    while True:
        block = file.read(BLOCK)
        raw = rest + block
        cut = len(raw)
        while (
            cut and cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80
        ):  # do not cut a character in two
            cut -= 1
        if block and cut and raw[cut - 1] >= 0xC0:
            cut -= 1
        if not block:
            cut = len(raw)
        raw, rest = raw[:cut], raw[cut:]
        try:
            text, at = text[at:] + raw.decode("utf-8"), 0
        except UnicodeDecodeError as error:
            fault_line = line + text.count("\n", at) + raw.count(b"\n", 0, error.start)
            offset = file.tell() - len(rest) - len(raw) + error.start
            bad = f"byte 0x{raw[error.start]:02x} at offset {offset}"
            raise ValueError(
                f"{path}:{fault_line}: {bad} is not UTF-8; {not_utf8(path, offset)}"
            ) from None
        while True:
            begin = at
            while at < len(text) and text[at] in " \t\r\n,[" and not (text[at] == "[" and opened):
                opened |= text[at] == "["
                at += 1
            line += text.count("\n", begin, at)
            if at < len(text) and text[at] == "]":
                behind = (text[at + 1 :].encode() + rest).strip()
                while not behind and (block := file.read(BLOCK)):
                    behind = block.strip()
                if behind:
                    raise ValueError(
                        f"{path}:{line}: broken JSON: text behind the end of the array"
                    )
                return
            try:
                row, end = decoder.raw_decode(text, at)
                # A number could go on in the next block; an object or a string is complete when it
                # ends.
                if end == len(text) and block and not isinstance(row, dict | str | list):
                    break
            except (ValueError, RecursionError) as error:
                if block and len(text) - at <= MAX_ROW_BYTES:
                    break  # perhaps only cut off: read on
                if len(text) - at > MAX_ROW_BYTES:
                    raise ValueError(
                        f"{path}:{line}: {too_long(len(text) - at)}, or broken JSON"
                    ) from None
                if at >= len(text):
                    raise ValueError(
                        f"{path}:{line}: broken JSON: the array does not end with ]"
                    ) from None
                pos = getattr(error, "pos", at)
                fault_line = line + text.count("\n", at, pos)
                raise ValueError(
                    f"{path}:{fault_line}: broken JSON: {getattr(error, 'msg', error)}"
                ) from None
            yield (line, row, lone_surrogate(row, text[at:end])), file.tell()
            line += text.count("\n", at, end)
            at = end
