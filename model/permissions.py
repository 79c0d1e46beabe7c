"""Who can have written a file: code that others could have put there must not be run."""

import os
import stat
from pathlib import Path


def open_to_others(path: Path) -> bool:
    """Whether others than we, our group, root and the owner of this file can have written there.

    On Windows folders inherit who may write there, and these numbers say nothing.
    """
    if not hasattr(os, "getuid"):
        return False
    status, owners = path.stat(), (0, os.getuid(), os.stat(__file__).st_uid)
    others = stat.S_IWOTH if status.st_gid == os.getgid() else stat.S_IWOTH | stat.S_IWGRP
    return status.st_uid not in owners or bool(status.st_mode & others)
