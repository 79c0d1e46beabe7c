"""What can be wrong with a row before anybody looks at its fields."""

import json


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
