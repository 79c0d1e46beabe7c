"""How hard a row is, where a field of it says so: --curriculum field:NAME."""

import json
import sys


def read_difficulty(row: object, field: str) -> float:
    """The number in a field of a row; ValueError: there is none."""
    value = row.get(field) if isinstance(row, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and abs(value) <= sys.float_info.max:
        return float(value)
    found = "no such field" if value is None else json.dumps(value)[:40]
    raise ValueError(f"--curriculum field:{field} needs a number there, found {found}")
