"""How scripts that do without torch end, and which errors are the user's to mend."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from runtime.process.terminal import OutlivingStream, prepare_streams

# Errors of files that another value of a flag would mend.
USAGE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
USAGE_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENXIO, errno.ENODEV)


def run(main: Callable[[], int | None]) -> None:
    """Run the main of a script without torch, and turn its end into an exit code.

    See `launch.run`, which does so for all others.
    """
    prepare_streams()
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            traceback.print_exc()
        print(f"error: {describe_error(error)}", file=sys.stderr, flush=True)
        code = 2 if is_usage_error(error) else 1
    sys.stdout.flush()
    sys.exit(code)


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


class ProductStream(OutlivingStream):
    """A stream for what a script makes, without which it ends, by SystemExit.

    Quietly with code 141 (as by SIGPIPE) where the reader has left, with one line and code 1 where
    the disk is full.
    """

    def drop(self, error: OSError) -> None:
        super().drop(error)
        if error.errno in (errno.EPIPE, errno.EIO):  # a pipe; a terminal
            sys.exit(141)
        name = "stdout" if sys.stdout is self else "stderr"
        print(f"error: {name}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(1)


def end_with_reader() -> None:
    """Have the script end when its output, all that it makes, cannot be written any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, OutlivingStream):
            setattr(sys, name, ProductStream(stream.stream))
