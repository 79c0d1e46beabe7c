"""Where checkpoints lie: what is there is whole, and what is whole is found again.

    checkpoints/step_00000100/.metadata, *.distcp   tensors, in the format of
    torch.distributed.checkpoint checkpoints/step_00000100/run.pt                counters, scaler,
    generators, identity of the run checkpoints/step_00000100/manifest.json         size and SHA-256
    of every file, written last

A checkpoint is written beside its place (`.tmp-...`), flushed to the disk and renamed, so that a
reader sees all of it or nothing, whenever the writer dies. The newest checkpoint whose manifest
holds is the one to resume from.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

MANIFEST = "manifest.json"


def begin(folder: Path, step: int) -> Path:
    """An empty place to write the checkpoint of a step to; what a killed writer left behind is
    removed."""
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
    folder, place = building.parent, building.with_name(building.name.removeprefix(".tmp-"))
    if place.exists():  # an invalid one of a run before, or the same step saved again
        remove(place)
    os.rename(building, place)
    flush(folder)
    # The one just written is good, so whatever goes now, a good one remains.
    for old in list_checkpoints(folder)[max(1, keep) :]:
        remove(old)
    return place


def write_state(state: dict | str, file) -> None:
    """Write tensors (or a text) into an open file, to the disk. torch hides the OSError of a full
    disk: unwrap it."""
    try:
        if isinstance(state, str):
            file.write(state.encode())
        else:
            torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    except RuntimeError as error:
        cause = error.__cause__ or error.__context__
        raise (
            cause
            if isinstance(cause, OSError)
            else OSError(None, f"could not write: {error}", file.name)
        ) from None


def save_file(path: Path, state: dict | str) -> None:
    """Write one file of tensors, or a text, so that `path` is the old or the new one, never a part.

    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            write_state(state, file)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def not_saved(folder: Path, step: int, why: str) -> OSError:
    """The error of a save that failed; says which checkpoint is still good."""
    last = next((c.name for c in list_checkpoints(folder) if not fault(c)), "")
    advice = (
        f"{last} is intact: make room and go on with --resume auto"
        if last
        else "none was saved before"
    )
    return OSError(f"cannot save the checkpoint of step {step} in {folder}: {why}; {advice}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest step first, whether they are valid or not."""
    return sorted(folder.glob("step_*"), reverse=True)


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or an empty string: every file is there with its size and
    hash."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if (checkpoint / name).stat().st_size != expected["size"]:
                return (
                    f"{name} has {(checkpoint / name).stat().st_size:,} bytes instead of"
                    f" {expected['size']:,}"
                )
            if describe(checkpoint / name) != expected:
                return f"{name} was altered: its hash differs from the manifest's"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means; a line on stderr for every newer one that had to be
    passed over.

    Args:
        folder: the run's own checkpoints folder.
        resume: 'none', 'auto' (newest valid one in `folder`, None where none was ever saved), or
        the path of a
            checkpoint, of a `checkpoints` folder or of a run folder.

    Raises:
        ValueError: nothing at that path, or no checkpoint there is valid.
    """
    if resume == "none":
        return None
    path = folder if resume == "auto" else Path(resume)
    if path.name == "latest" and not path.exists():
        path = path.parent
    if (path / MANIFEST).exists() or path.name.startswith("step_"):
        if problem := fault(path):
            raise ValueError(f"--resume {path}: {problem}")
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    skipped = []
    for checkpoint in list_checkpoints(path):
        if not (problem := fault(checkpoint)):
            if skipped:
                print("\n".join(skipped), file=sys.stderr, flush=True)
            return checkpoint
        skipped.append(f"checkpoint {checkpoint} is damaged and passed over: {problem}")
    if skipped:
        raise ValueError(f"--resume {resume}: no valid checkpoint: " + "; ".join(skipped))
    if resume != "auto":
        raise ValueError(f"--resume {resume}: no checkpoint there")
    return None


def refuse_other_shapes(folder: Path) -> None:
    """A run that was started with another --dim or --use_moe has another folder: do not begin anew
    in silence.

    Raises:
        ValueError: the same stage has checkpoints under another shape, and none under this one.
    """
    stage = re.sub(r"_\d+(_moe)?$", "", folder.name)
    for other in sorted(folder.parent.glob(f"{stage}_*/checkpoints")):
        name = other.parent.name
        if re.fullmatch(rf"{re.escape(stage)}_\d+(_moe)?", name) and list_checkpoints(other):
            raise ValueError(
                f"--resume auto: {folder} has no checkpoint, but {name} has: was that run meant"
                " (--dim, --use_moe)? For a new run beside it use --resume none or another"
                " --save_weight"
            )


def describe(path: Path, between: Callable[[], None] = lambda: None) -> dict:
    """Size and hash of a file; `between` is called between its blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            between()
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def seal(path: Path) -> dict:
    """Bring to the disk what another program wrote to a file; its size and hash."""
    flush(path)
    return describe(path)


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
    """Bring to the disk what was written to a file by whomever, or the renames in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
