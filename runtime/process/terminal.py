"""Text on its way to a terminal, a pipe or a log: whatever becomes of it, writing ends no run."""

import os
import sys

MODES = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY, "stderr": os.O_WRONLY}  # descriptors 0, 1, 2


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
            from runtime.process.closed_streams import open_null_stream

            setattr(sys, name, open_null_stream(descriptor, mode))
        stream, is_input = getattr(sys, name), name == "stdin"
        if hasattr(stream, "reconfigure"):  # else it is something of a notebook
            errors = "replace" if is_input else "backslashreplace"
            stream.reconfigure(encoding=encoding, errors=errors)
            if not is_input and not isinstance(stream, OutlivingStream):
                setattr(sys, name, OutlivingStream(stream))


class OutlivingStream:
    """A text stream whose reader, a terminal, a pipe or a full disk, may go: the run goes on."""

    def __init__(self, stream) -> None:
        self.stream = stream

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
