"""What is said about the error that ends a script, and whether the user can mend it."""

import errno
import os
import sys
import traceback

# Errors of files that another value of a flag would mend.
USAGE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
USAGE_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENXIO, errno.ENODEV)


def report_error(error: Exception) -> int:
    """Say on stderr, in a line, what ends a script without torch; its exit code."""
    if os.environ.get("MINIMIND_DEBUG"):
        traceback.print_exc()
    print(f"error: {describe_error(error)}", file=sys.stderr, flush=True)
    return 2 if is_usage_error(error) else 1


def is_usage_error(error: Exception) -> bool:
    """Whether the user can mend it by other flags or files."""
    return isinstance(error, (ValueError, *USAGE)) or getattr(error, "errno", None) in USAGE_NUMBERS


def describe_error(error: Exception) -> str:
    """An error in one line; of a file with its name."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return shortened(" ".join(text.split()), 1000) or type(error).__name__


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
