"""Atomic, checksummed checkpoints: a reader sees all of one or nothing, whenever the writer dies.

    checkpoints/step_00000100/.metadata, *.distcp   tensors: torch.distributed.checkpoint's format
    checkpoints/step_00000100/run.pt                counters, scaler, generators, identity
    checkpoints/step_00000100/manifest.json         size and SHA-256 of every file, written last

A checkpoint is written beside its place (`.tmp-...`), flushed to the disk and renamed. The newest
one whose manifest holds is the one to resume from.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

MANIFEST = "manifest.json"


def begin(folder: Path, step: int) -> Path:
    """An empty place for the checkpoint of a step; what a killed writer left behind is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    building = folder / f".tmp-step_{step:08d}"
    building.mkdir()
    return building


def finish(building: Path, step: int, files: dict[str, dict], keep: int) -> Path:
    """Make what `begin` began a checkpoint, and remove the oldest ones beyond `keep`.

    Args:
        files: name -> {"size", "sha256"} of all that was written; it is on the disk already.
        keep: checkpoints that stay, at least 1.

    Raises:
        OSError: the disk is full or not writable, or files are not where this process sees them.
    """
    for name in files:
        if not (building / name).exists():
            raise OSError(
                None,
                f"{name} of another node is not here: --out_dir must lie on storage that all nodes"
                " share",
            )
    save_file(building / MANIFEST, json.dumps({"step": step, "files": files}))
    folder = building.parent
    checkpoint = folder / building.name.removeprefix(".tmp-")
    if checkpoint.exists():  # an invalid one of a run before, or the same step saved again
        remove(checkpoint)
    os.rename(building, checkpoint)
    flush(folder)
    # The one just written is good, so whatever goes now, a good one remains.
    for old in list_checkpoints(folder)[max(1, keep) :]:
        remove(old)
    return checkpoint


def save_file(path: Path, state: dict | str) -> None:
    """Write one file of tensors, or a text, so that `path` is the old or the new one, never a part.

    Raises:
        OSError: it could not be written, with the name of the file; the old one is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            write_state(state, file)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OSError(error.errno, reason, os.fspath(path)) from None
        raise


def write_state(state: dict | str, file) -> None:
    """Write tensors (or a text) into an open file, to the disk."""
    try:
        if isinstance(state, str):
            file.write(state.encode())
        else:
            torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    except RuntimeError as error:  # torch hides the OSError of a full disk
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise cause from None
        raise OSError(None, f"could not write: {error}", file.name) from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest step first, whether they are valid or not."""
    return sorted(folder.glob("step_*"), reverse=True)


def describe(path: Path, between: Callable[[], None] = lambda: None) -> dict:
    """Size and hash of a file; `between` is called between its blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            between()
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def remove(checkpoint: Path) -> None:
    """Take a checkpoint out of sight in one step, then delete it."""
    trash = checkpoint.with_name(f".old-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(checkpoint, trash)
    shutil.rmtree(trash)


def clean(folder: Path) -> None:
    """Delete what a killed writer left behind."""
    for left in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        shutil.rmtree(left, ignore_errors=True)


def flush(path: Path) -> None:
    """Bring to the disk what was written to a file by whomever, or the renames in a folder.

    Windows opens no folders, and syncs only what is open for writing.
    """
    is_windows = not hasattr(os, "O_DIRECTORY")
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
