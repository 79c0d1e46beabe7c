"""Whether what lies in the folder of token caches is what was written there."""

import json
import sys
from pathlib import Path

import numpy as np

from dataset.checksums import array_checksum, dict_checksum

ALTERED = "altered"  # a file in a cache that says: build it again


def recall(path: Path) -> dict | None:
    """What was remembered; None: nothing, or it is torn or altered."""
    try:
        value = json.loads(path.read_text("utf-8"))
        return value if value["checksum"] == dict_checksum(value) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    meta = json.loads((folder / "meta.json").read_text())
    if (folder / ALTERED).exists():
        raise ValueError("a row differed from its checksum")
    has_checksums = {"checksum", "checksums"} & meta.keys()
    if has_checksums and dict_checksum(meta) != meta.get("checksum"):
        raise ValueError("meta.json differs from its checksum")
    checksums, names = meta.get("checksums", {}), ["lengths.npy", "supervised.npy"]
    names += ["difficulty.npy"] if meta.get("field") else []
    arrays = {name: np.load(folder / name) for name in {*names, *checksums}}
    for name, checksum in checksums.items():
        if array_checksum(arrays[name]) != checksum:
            raise ValueError(f"{name} differs from its checksum")
    starts = np.concatenate([[0], np.cumsum(arrays["lengths.npy"], dtype=np.int64)])
    token_bytes = np.dtype(meta["dtype"]).itemsize
    for name, width in (("tokens.bin", token_bytes), ("mask.bin", int(meta["masked"]))):
        if (folder / name).stat().st_size != starts[-1] * width:
            raise ValueError(f"{name} has a wrong size")
    if meta["masked"] and not has_checksums:  # of an older cache the rows can only be counted
        mask, starts = np.memmap(folder / "mask.bin", np.uint8, "r"), starts[:-1]
        counts = np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]
        if not np.array_equal(counts, arrays["supervised.npy"]):
            raise ValueError("mask.bin was altered")


def altered_row(folder: Path, row: int, is_mask: bool) -> ValueError:
    """A row is not as it was written. Until the next start the cache stays for those who read it.

    Args:
        folder: of the cache; it is marked, so that the next start builds it again.
        is_mask: the mask is another, not the tokens.
    """
    path = folder / ("mask.bin" if is_mask else "tokens.bin")
    advice = "the next start builds this cache again: go on with --resume auto"
    try:
        (folder / ALTERED).touch()
    except OSError:
        advice = f"delete {folder} to have it built again"
    return ValueError(f"{path} was altered: row {row} differs from its checksum; {advice}")
