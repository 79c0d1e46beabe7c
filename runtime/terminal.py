"""Text on its way to a terminal, a pipe or a log: whatever becomes of it, writing ends no run.
Needs no package."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

# Errors of files that another value of a flag would mend.
USAGE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
USAGE_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.ENXIO, errno.ENODEV)
# Of the descriptors 0, 1 and 2.
MODES = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY, "stderr": os.O_WRONLY}


def prepare_streams(encoding: str | None = None) -> None:
    """Make stdin, stdout and stderr such that no text and no reader of it ends this script.

    A stream that is closed, as by `>&-`, is the null device. A character that the encoding of
    stdout or stderr lacks is written as an escape, such as \\u4f60; what cannot be decoded on stdin
    reads as U+FFFD. Who reads the output may leave, see `OutlivingStream`. Every script calls this
    first, most of them by `launch.run`.

    Args:
        encoding: of all three streams; by default it stays the one of the locale or of
        PYTHONIOENCODING.
    """
    for descriptor, (name, mode) in enumerate(MODES.items()):
        if getattr(sys, name) is None:
            setattr(sys, name, open_null_stream(descriptor, mode))
        stream, reads = getattr(sys, name), name == "stdin"
        if hasattr(stream, "reconfigure"):  # else it is something of a notebook
            stream.reconfigure(encoding=encoding, errors="replace" if reads else "backslashreplace")
            if not reads and not isinstance(stream, OutlivingStream):
                setattr(sys, name, OutlivingStream(stream, name))


def open_null_stream(descriptor: int, mode: int):
    """A text stream to or from nowhere.

    It takes the descriptor that it stands for where that is free: the next file that is opened
    would get it, and all that is printed by libraries, and by processes that this one starts, would
    be written there.
    """
    try:
        os.fstat(descriptor)
        null = os.open(os.devnull, mode)
    except OSError:
        null = os.open(os.devnull, mode)
        os.dup2(null, descriptor)  # which makes it inheritable
        if null != descriptor:
            os.close(null)
        null = descriptor
    os.set_inheritable(null, null == descriptor)
    return open(null, "r" if mode == os.O_RDONLY else "w", encoding="utf-8", closefd=False)


def end_with_reader() -> None:
    """From here on the script ends when its output cannot be written any more: the output is all
    that it makes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, OutlivingStream):
            stream.is_product = True


class OutlivingStream:
    """A text stream that takes what nobody reads any more, a terminal, a pipe or a full disk: a run
    has to go on.

    Attributes:
        is_product: the script ends instead, by SystemExit: quietly with code 141 (as by SIGPIPE)
        where the reader has
            left, with one line and code 1 where the disk is full.
    """

    def __init__(self, stream, name: str) -> None:
        self.stream, self.name = stream, name
        self.is_product = False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    def drop(self, error: OSError) -> None:
        """Send all that is still to come to nowhere, also what Python flushes at its end."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
        if self.is_product and error.errno in (errno.EPIPE, errno.EIO):  # a pipe; a terminal
            sys.exit(141)
        if self.is_product:
            print(f"error: {self.name}: {error.strerror}", file=sys.stderr, flush=True)
            sys.exit(1)


def run(main: Callable[[], int | None]) -> None:
    """Run the main of a script that does without torch, and turn its end into an exit code; see
    `launch.run`."""
    prepare_streams()
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError) as error:
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


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Have an OSError in here name its file: that of writing to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def replace_surrogates(text: str) -> str:
    """Text that UTF-8 can hold. A file name that is no UTF-8 is not such a text, and trackers
    refuse it."""
    return text.encode("utf-8", "replace").decode("utf-8")
