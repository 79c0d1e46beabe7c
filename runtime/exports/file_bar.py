"""Progress of a file that someone else writes."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from dataset.progress import byte_bar

EVERY = 0.2  # seconds between two looks at the file


@contextlib.contextmanager
def file_bar(path: Path, total: int) -> Iterator[None]:
    """A bar that follows the size of `path` while a block, such as torch.save, writes it.

    Args:
        total: about how many bytes it is to have.
    """
    done = threading.Event()

    def follow() -> None:
        while not done.wait(EVERY):
            with contextlib.suppress(OSError):  # not there yet, or renamed
                bar.update(min(path.stat().st_size, total) - bar.n)

    with byte_bar(total, "writing weights") as bar:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
            bar.update(total - bar.n)
        finally:
            done.set()
            thread.join()
