"""How scripts that do without torch end."""

import errno
import sys
from collections.abc import Callable

from runtime.process.terminal import OutlivingStream, prepare_streams


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
        from runtime.process.errors import report_error

        code = report_error(error)
    sys.stdout.flush()
    sys.exit(code)


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
