"""What tests/without_unix.py hides from code that lies here."""

import mmap
import os
import signal

try:
    import fcntl  # noqa: F401
except ImportError as error:
    print(type(error).__name__)
print(hasattr(os, "fork"), hasattr(signal, "SIGHUP"), hasattr(mmap, "MADV_DONTNEED"))
print(hasattr(signal, "pthread_sigmask"))
