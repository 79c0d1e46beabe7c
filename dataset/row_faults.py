"""Faults of rows, in words."""

import json
from pathlib import Path
from typing import BinaryIO

FORMATS = {
    "minimind": '{"conversations": [{"role", "content"}, ...]}',
    "sharegpt": '{"conversations": [{"from", "value"}, ...]}',
    "alpaca": '{"instruction", "input", "output"}',
    "openai": '{"messages": [{"role", "content"}, ...]}',
}


def too_long(size: int, limit: int) -> str:
    """size, limit: in bytes."""
    limit = f"the limit is {limit >> 20} MB"
    return f"row of more than {size / 2**20:.0f} MB, {limit}; split it"


def skip_line(file: BinaryIO, raw: bytes, limit: int) -> str:
    """Skip the rest of a line that begins with `raw`, without holding it; says that it is too long."""
    size = len(raw)
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(limit)
        size += len(raw)
    return too_long(size, limit)


def explain_line(error: Exception, path: Path, begin: int, advice: str) -> tuple[str, str]:
    """What is wrong with a line that cannot be read, and what to do about its file.

    Args:
        begin: where the line begins in the file.
        advice: what was said of an earlier line; "": nothing yet. It is one for all of them.
    """
    if isinstance(error, UnicodeDecodeError):
        from dataset.file_kinds import not_utf8

        advice = advice or not_utf8(path, begin)
        bad = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
        return f"{bad} is not UTF-8; {advice}", advice
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} at column {error.colno}", advice
    return str(error), advice


def find_surrogate(row: object) -> str:
    """What is wrong with a row that spells half a character, which no encoding can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return f"a lone surrogate {half} in it, which is half a character and no text"
    return ""


def wrong_schema(row: dict, fmt: str | None = None) -> ValueError:
    """A row is of no known format, or not of the one that the first row has."""
    found = ", ".join(map(repr, list(row)[:10])) or "none"
    if fmt:
        like = f"not a row of the {fmt} format like the first, {FORMATS[fmt]}"
        return ValueError(f"{like}; keys found: {found}")
    accepted = "; ".join(FORMATS.values())
    return ValueError(f"unknown schema, keys found: {found}; accepted: {accepted}")


def wrong_document(row: object) -> ValueError:
    """A row of pretraining has no text."""
    if not isinstance(row, dict):
        shape = 'a row must be an object {"text": ...}'
        return ValueError(f"{shape}, found {type(row).__name__}")
    keys = ", ".join(list(row)[:5]) or "none"
    return ValueError(f'a pretraining row needs a string under "text"; keys found: {keys}')
