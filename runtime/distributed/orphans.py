"""A process that a launcher started must not outlive it, whenever that is killed."""

import ctypes
import os
import signal
import sys
import threading
import time

from runtime.distributed.environment import NEEDED


def die_with_launcher(started_by: str | None) -> None:
    """As `launcher.die_with_launcher`; `started_by` as for `die_with_parent`."""
    by_torchrun_or_deepspeed = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ
    is_launched = by_torchrun_or_deepspeed and all(os.environ.get(name) for name in NEEDED)
    if is_launched or started_by is not None:
        die_with_parent(started_by)


def die_with_parent(started_by: str | None) -> None:
    """Have this process killed when its parent is; it ends now where that is dead already.

    Args:
        started_by: the id of the process that must be the parent; None: whatever is.
    """
    parent = os.getppid()
    if started_by not in (None, str(parent)) or parent == 1 and not is_python(1):
        os._exit(1)  # it was killed before this process could ask
    if not signal_when_parent_dies(getattr(signal, "SIGKILL", signal.SIGTERM)):
        threading.Thread(target=watch_parent, args=[parent], daemon=True).start()
    if os.getppid() != parent:  # it was killed while we asked
        os._exit(1)


def is_python(process: int) -> bool:
    """Whether a process may be a launcher.

    Process 1 is one in a container; elsewhere it takes in orphans.
    """
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return b"python" in file.read().split(b"\0")[0]
    except OSError:
        return sys.platform == "linux"  # no way to know


def signal_when_parent_dies(number: int) -> bool:
    """Ask the kernel for it; False where that cannot be had, which is everywhere but on Linux."""
    try:
        return ctypes.CDLL(None).prctl(1, number) == 0  # PR_SET_PDEATHSIG
    except (OSError, AttributeError, TypeError):  # the last one on Windows
        return False


def watch_parent(parent: int) -> None:
    """End this process when its parent is another one."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
