"""Progress of what takes more than a few seconds."""

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LINE = "{desc}: {percentage:.0f}% of {total_fmt} {unit}, {elapsed} so far, {remaining} to go\n"


def byte_bar(total: int, what: str) -> tqdm:
    """A bar of bytes on standard error; a log gets a line a minute instead."""
    return count_bar(total, what, "B", unit_scale=True)


def show_bytes(chunks: Iterable[tuple], total: int, what: str) -> Iterator[tuple]:
    """Pass chunks on, of which each says last how many bytes it has; the bar counts them."""
    with byte_bar(total, what) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(chunk[-1])


def count_bar(total: int, what: str, unit: str, **options) -> tqdm:
    """The same of anything that is counted."""
    every, look = (0.1, None) if sys.stderr.isatty() else (60, LINE)  # seconds
    options |= {"unit": unit, "mininterval": every, "delay": every, "bar_format": look}
    return tqdm(total=total, desc=what, **options)
