"""Who can have written a file: code that others could have put there must not be run."""

import os
import stat
from pathlib import Path


def open_to_others(path: Path) -> bool:
    """Whether somebody else can have put code there, which must not be run.

    That is so where neither we, root nor the owner of this file own it, or where more may write to
    it than its owner and our own group.
    """
    status = path.stat()
    others = stat.S_IWOTH if status.st_gid == os.getgid() else stat.S_IWOTH | stat.S_IWGRP
    owners = (0, os.getuid(), os.stat(__file__).st_uid)
    return status.st_uid not in owners or bool(status.st_mode & others)
