"""The hash of a large file, kept until the file changes: reading gigabytes takes long."""

import hashlib
import os
from pathlib import Path

from dataset.cache_checks import recall
from dataset.checksums import remember


def kept_hash(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file's content, remembered in cache_dir until the file changes.

    The memory is keyed by size, inode and both times; the change time cannot be set back, so an
    edit is always seen.
    """
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    memo = cache_dir / f"hash_{hashlib.sha256(os.fsencode(identity[0])).hexdigest()[:16]}.json"
    known = recall(memo)
    if known and known["identity"] == identity:
        return known["sha256"]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):  # hashlib.file_digest is of Python 3.11
            digest.update(block)
    remember(memo, {"identity": identity, "sha256": digest.hexdigest()})
    return digest.hexdigest()
