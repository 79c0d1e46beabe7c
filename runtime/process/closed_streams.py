"""A standard stream that is closed, as by `>&-`."""

import os


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
