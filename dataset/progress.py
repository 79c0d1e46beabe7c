"""Progress of what takes more than a few seconds."""

import sys

from tqdm import tqdm


def byte_bar(total: int, what: str) -> tqdm:
    """A bar of bytes on standard error; a log gets a line a minute instead."""
    return count_bar(total, what, "B", unit_scale=True)


def count_bar(total: int, what: str, unit: str, **options) -> tqdm:
    """The same of anything that is counted."""
    every = 0.1 if sys.stderr.isatty() else 60  # seconds
    options |= {"unit": unit, "mininterval": every, "delay": every}
    return tqdm(total=total, desc=what, **options)
