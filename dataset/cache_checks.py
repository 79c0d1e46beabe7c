"""Whether a token cache that lies there is what was written, and what to say where it is not."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

from dataset.cache_files import TokenCache
from dataset.checksums import array_checksum, dict_checksum

ALTERED = "altered"  # a file in a cache that says: build it again


def is_whole(folder: Path, report: bool) -> bool:
    """Whether a cache is what was written, but for its rows, which are checked when they are read.

    Args:
        report: say that it is built again where it is not.
    """
    try:
        check_files(folder)
    except Exception as error:  # of json and numpy, a dozen types for a damaged header
        if report:
            text = f"the token cache {folder} is damaged: {error}: it is built again"
            print(text, file=sys.stderr, flush=True)
        return False
    return True


def check_files(folder: Path) -> None:
    """Compare the small files of a cache with their checksums, the large ones with their sizes."""
    cache, meta = TokenCache(folder), json.loads((folder / "meta.json").read_text())
    if (folder / ALTERED).exists():
        raise ValueError("a row differed from its checksum")
    has_checksums = {"checksum", "checksums"} & meta.keys()  # an older cache has none
    if has_checksums and dict_checksum(meta) != meta.get("checksum"):
        raise ValueError("meta.json differs from its checksum")
    for name, checksum in meta.get("checksums", {}).items():
        if array_checksum(getattr(cache, Path(name).stem)) != checksum:
            raise ValueError(f"{name} differs from its checksum")
    tokens = cache.starts[-1]
    for name, width in (("tokens.bin", cache.dtype.itemsize), ("mask.bin", cache.masked)):
        if (folder / name).stat().st_size != tokens * width:
            raise ValueError(f"{name} has a wrong size")


def altered_row(cache: TokenCache, row: int, ids: np.ndarray) -> ValueError:
    """A row is not as it was written. Until the next start the cache stays for those who read it.

    Args:
        cache: its folder is marked, so that the next start builds it again.
        ids: what its tokens.bin has of the row.
    """
    is_ids = cache.checksums is not None and zlib.crc32(ids) != cache.checksums[row, 0]
    path = cache.folder / ("tokens.bin" if is_ids else "mask.bin")
    advice = "the next start builds this cache again: go on with --resume auto"
    try:
        (cache.folder / ALTERED).touch()
    except OSError:
        advice = f"delete {cache.folder} to have it built again"
    return ValueError(f"{path} was altered: row {row} differs from its checksum; {advice}")
