"""The checkpoint store: what is saved is whole, and what is whole is found again.

    checkpoints/step_00000100/state.pt        everything a run needs to go on
    checkpoints/step_00000100/manifest.json   size and SHA-256 of every file, written last

A checkpoint is written beside its place (`.tmp-...`), flushed to the disk and renamed, so that a reader sees all of it
or nothing, whenever the writer dies. The newest checkpoint whose manifest holds is the one to resume from.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from runtime.parallel import gather_objects, unwrap, world

MANIFEST = "manifest.json"


def save_run(folder: Path, keep: int, model, optimizer, scaler, progress: dict, identity: dict) -> None:
    """Save a checkpoint of the whole run. Every rank calls it at the same step; rank 0 writes.

    Args:
        folder: the run's, `out/full_sft_512`.
        keep: checkpoints that stay.
        progress: counters, with `step`.
        identity: what `check_identity` compares at a resume.

    Raises:
        OSError: on every rank, when rank 0 could not write it; says which checkpoint is still good.
    """
    folder, rng, problem = folder / "checkpoints", gather_objects(rng_state()), ""
    if world()[0] == 0:
        state = {
            "model": unwrap(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "progress": progress,
            "identity": identity,
            "rng": rng,
        }
        try:
            save_checkpoint(folder, progress["step"], state, keep)
        except OSError as error:
            last = next((c.name for c in list_checkpoints(folder) if not fault(c)), "")
            advice = f"{last} is intact: make room and go on with --resume auto" if last else "none was saved before"
            what = f"the checkpoint of step {progress['step']} in {folder}: {error.strerror or error}"
            problem = f"cannot save {what}; {advice}"
    if problem := gather_objects(problem)[0]:
        raise OSError(problem)


def resume(folder: Path, source: str, identity: dict, model, optimizer, scaler) -> dict:
    """Put the checkpoint that `--resume` means back into the (unwrapped) model, optimizer, scaler and generators.

    On another number of ranks the generators cannot be those of before; they then go on from the current seed.

    Args:
        folder: the run's, `out/full_sft_512`.
        source: the value of --resume, see `find`.
        identity: of the run that wants to go on.

    Returns:
        The counters that were saved; zeros for a new run.

    Raises:
        ValueError: no valid checkpoint, or one of another run.
    """
    found = find(folder / "checkpoints", source)
    if found is None and source == "auto":
        refuse_other_shapes(folder)
    if found is None:
        return {"step": 0, "epoch": 0, "step_in_epoch": 0, "tokens": 0, "skipped": 0, "skipped_in_a_row": 0}
    state = torch.load(found / "state.pt", map_location="cpu", weights_only=True)
    check_identity(state["identity"], identity, found)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    rank, world_size = world()
    if len(state["rng"]) == world_size:
        set_rng_state(state["rng"][rank])
    if rank == 0:
        print(f"resumed from {found} behind step {state['progress']['step']}", flush=True)
    return state["progress"]


def refuse_other_shapes(folder: Path) -> None:
    """A run that was started with another --dim or --use_moe has another folder: do not begin anew in silence.

    Raises:
        ValueError: the same stage has checkpoints under another shape, and none under this one.
    """
    stage = re.sub(r"_\d+(_moe)?$", "", folder.name)
    for other in sorted(folder.parent.glob(f"{stage}_*/checkpoints")):
        name = other.parent.name
        if re.fullmatch(rf"{re.escape(stage)}_\d+(_moe)?", name) and list_checkpoints(other):
            raise ValueError(
                f"--resume auto: {folder} has no checkpoint, but {name} has: was that run meant (--dim, --use_moe)? "
                "For a new run beside it use --resume none or another --save_weight"
            )


def rng_state() -> dict:
    """State of this rank's generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(folder: Path, step: int, state: dict, keep: int) -> Path:
    """Write `folder/step_XXXXXXXX` and remove the oldest checkpoints beyond `keep`.

    Args:
        state: tensors, numbers, strings, and lists, tuples and dicts of them: what `weights_only` loading accepts.
        keep: checkpoints that stay, at least 1.

    Raises:
        OSError: the disk is full or not writable. Nothing half-written stays, older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    place = folder / f"step_{step:08d}"
    building = folder / f".tmp-{place.name}"
    try:
        building.mkdir()
        with open(building / "state.pt", "wb") as file:
            write_state(state, file)
        manifest = {"state.pt": describe(building / "state.pt")}
        with open(building / MANIFEST, "w") as file:
            json.dump({"step": step, "files": manifest}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(building)
        if place.exists():  # an invalid one of a run before, or the same step saved again
            remove(place)
        os.rename(building, place)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    # The one just written is good, so whatever goes now, a good one remains.
    for old in list_checkpoints(folder)[max(1, keep) :]:
        remove(old)
    return place


def write_state(state: dict | str, file) -> None:
    """Write tensors (or a text) into an open file, to the disk. torch hides the OSError of a full disk: unwrap it."""
    try:
        if isinstance(state, str):
            file.write(state.encode())
        else:
            torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    except RuntimeError as error:
        cause = error.__cause__ or error.__context__
        raise cause if isinstance(cause, OSError) else OSError(None, f"could not write: {error}", file.name) from None


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
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest step first, whether they are valid or not."""
    return sorted(folder.glob("step_*"), reverse=True)


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or an empty string: every file is there with its size and hash."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if (checkpoint / name).stat().st_size != expected["size"]:
                return f"{name} has {(checkpoint / name).stat().st_size:,} bytes instead of {expected['size']:,}"
            if describe(checkpoint / name) != expected:
                return f"{name} was altered: its hash differs from the manifest's"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


def find(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means; a line on stderr for every newer one that had to be passed over.

    Args:
        folder: the run's own checkpoints folder.
        resume: 'none', 'auto' (newest valid one in `folder`, None where none was ever saved), or the path of a
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
            if skipped and world()[0] == 0:
                print("\n".join(skipped), file=sys.stderr, flush=True)
            return checkpoint
        skipped.append(f"checkpoint {checkpoint} is damaged and passed over: {problem}")
    if skipped:
        raise ValueError(f"--resume {resume}: no valid checkpoint: " + "; ".join(skipped))
    if resume != "auto":
        raise ValueError(f"--resume {resume}: no checkpoint there")
    return None


def check_identity(saved: dict, current: dict, source: Path) -> None:
    """Refuse to go on with a run that is not the same run.

    Args:
        saved, current: flag name -> value of everything the training curve's data order and model depend on.

    Raises:
        ValueError: names every flag that differs with both values.
    """
    differing = [
        f"{name} was {saved.get(name)} and is {current.get(name)}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise ValueError(
            f"--resume {source}: this is another run: {'; '.join(differing)}. "
            "Use the flags it was started with, or --resume none for a new run"
        )


def describe(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
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


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
