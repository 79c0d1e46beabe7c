"""What went wrong where a file could not be written, in words that name it."""

import contextlib
import os
from pathlib import Path


def not_written(path: Path, temporary: Path, error: BaseException) -> BaseException:
    """The error of `store.save_file`; what was written of the file is removed.

    Returns:
        An OSError with the name of the file, or `error` itself where it is of another kind.
    """
    with contextlib.suppress(OSError):
        temporary.unlink()
    if isinstance(error, RuntimeError):  # torch hides the OSError of a full disk
        cause = error.__cause__ or error.__context__
        error = cause if isinstance(cause, OSError) else OSError(f"could not write: {error}")
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), os.fspath(path))
    return error


def reason(error: BaseException) -> str:
    """What went wrong, in a few words: torch wraps the OSError of a full disk in others."""
    if failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__):
        error = inner
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
