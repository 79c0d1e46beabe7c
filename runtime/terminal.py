"""Text on its way to a terminal, a pipe or a log: whatever it holds, writing it ends no run. Needs no package."""

import sys


def escape_unencodable(encoding: str | None = None) -> None:
    """Have stdout and stderr write a character that their encoding lacks as an escape, such as \\u4f60.

    What cannot be decoded on stdin reads as U+FFFD. Every script calls this first, most of them by `launch.run`.

    Args:
        encoding: of all three streams; by default it stays the one of the locale or of PYTHONIOENCODING.
    """
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # None when it is closed, something else in a notebook
            stream.reconfigure(encoding=encoding, errors=errors)


def replace_surrogates(text: str) -> str:
    """Text that UTF-8 can hold. A file name that is no UTF-8 is not such a text, and trackers refuse it."""
    return text.encode("utf-8", "replace").decode("utf-8")
