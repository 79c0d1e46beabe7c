"""Checksums of arrays and dicts, and small JSON files that have one."""

import json
import os
import zlib
from pathlib import Path

import numpy as np


def remember(path: Path, value: dict) -> None:
    """Write what `cache_checks.recall` gives back; readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**value, "checksum": dict_checksum(value)}))
    os.replace(temporary, path)


def dict_checksum(value: dict) -> int:
    """CRC-32 of a dict as JSON, its own "checksum" apart."""
    return zlib.crc32(json.dumps({**value, "checksum": 0}, sort_keys=True).encode())


def array_checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's content, dtype and shape."""
    return zlib.crc32(array, zlib.crc32(f"{array.dtype.str} {array.shape}".encode()))
