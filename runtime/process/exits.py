"""How scripts that do without torch end, and which errors are the user's to mend."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from runtime.process.terminal import OutlivingStream, describe_error, prepare_streams

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


def end_with_reader() -> None:
    """Have the script end when its output, all that it makes, cannot be written any more."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, OutlivingStream):
            stream.is_product = True
