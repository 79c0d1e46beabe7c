"""What earlier saves left in a run's folder of checkpoints: which ones stay, and how one goes."""

import os
import shutil
from pathlib import Path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest step first, whether they are valid or not."""
    return sorted(folder.glob("step_*"), reverse=True)


def keep_newest(folder: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`.

    The newest was written just now and is good, so whatever goes, a good one remains.
    """
    for old in list_checkpoints(folder)[max(1, keep) :]:
        remove(old)


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
