"""Faults of rows, in words."""

import json

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
