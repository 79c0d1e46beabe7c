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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

MANIFEST = "manifest.json"

# Without a process group is what we mean.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


@contextlib.contextmanager
def new_checkpoint(
    folder: Path, step: int, keep: int, files: dict[str, dict] | None = None
) -> Iterator[Path]:
    """A place to write a checkpoint in, which it becomes when the block ends without an error.

    Args:
        folder: of the checkpoints; the oldest ones beyond `keep`, at least 1, are removed then.
        files: name -> {"size", "sha256"} of what the block has described already.
    """
    building, checkpoint = (folder / f"{state}step_{step:08d}" for state in (".tmp-", ""))
    rotation = None
    if folder.exists():
        from runtime.saving import rotation

        rotation.clean(folder)
    building.mkdir(parents=True)
    try:
        yield building
        files = files or {path.name: describe(path) for path in building.iterdir()}
        save_file(building / MANIFEST, json.dumps({"step": step, "files": files}))
        if rotation and checkpoint.exists():  # an invalid one, or the same step saved again
            rotation.remove(checkpoint)
        os.rename(building, checkpoint)
        flush_folder(folder)
        if rotation:
            rotation.keep_newest(folder, keep)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_tensors(building: Path, tensors: dict[str, Tensor], planner=None, group=None) -> None:
    """Write tensors to the disk: all processes of `group` together, or this one alone."""
    import torch.distributed.checkpoint as dcp  # here, as it takes a second

    writer = dcp.FileSystemWriter(building)
    words = {"storage_writer": writer, "planner": planner, "process_group": group}
    dcp.save(tensors, **words, no_dist=group is None)


def write_weights(path: Path, state_dict: dict[str, Tensor], config: str) -> None:
    """Write whole tensors of the CPU, and the JSON of their configuration beside them.

    A head that equals the embedding is saved once, tied to it.
    """
    save_file(path.with_suffix(".json"), config)
    head = state_dict.get("lm_head.weight")
    if head is not None and torch.equal(head, state_dict["model.embed_tokens.weight"]):
        state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    save_file(path, state_dict)


def save_file(path: Path, state: dict | str) -> None:
    """Write one file of tensors, or a text, so that `path` is the old or the new one, never a part.

    Raises:
        OSError: it could not be written, with the name of the file; the old one is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            if isinstance(state, str):
                file.write(state.encode())
            else:
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        from runtime.saving.disk_errors import not_written

        raise not_written(path, temporary, error) from None


def describe(path: Path, between: Callable[[], None] = lambda: None) -> dict:
    """Size and hash of a file; `between` is called between its blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            between()
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Have an OSError in here name its file: that of writing to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise


def flush_folder(folder: Path) -> None:
    """Bring the renames in a folder to the disk; Windows opens no folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
