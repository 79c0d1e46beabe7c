"""Whether a checkpoint is what was saved, and what to say where saving one failed."""

import json
from collections.abc import Iterable
from pathlib import Path

from runtime.saving.disk_errors import reason
from runtime.saving.rotation import list_checkpoints
from runtime.saving.store import MANIFEST, describe


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; "" where every file is there with its size and hash."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes instead of {expected['size']:,}"
            if describe(checkpoint / name) != expected:
                return f"{name} was altered: its hash differs from the manifest's"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


def check_seen(building: Path, files: Iterable[str]) -> None:
    """OSError: files that other nodes have written are not where this process sees them."""
    for name in files:
        if not (building / name).exists():
            missing = f"{name} of another node is not here"
            raise OSError(None, f"{missing}: --out_dir must lie on storage that all nodes share")


def raise_not_saved(folder: Path, step: int, error: BaseException) -> None:
    """Say why a save failed, and which checkpoint is still good.

    Raises:
        OSError: it says so, where `error` is one of writing.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    if not isinstance(error, OSError | RuntimeError | CheckpointException):
        return
    last = next((c.name for c in list_checkpoints(folder) if not fault(c)), "")
    advice = "none was saved before"
    if last:
        advice = f"{last} is intact: make room and go on with --resume auto"
    fault_line = f"cannot save the checkpoint of step {step} in {folder}: {reason(error)}; {advice}"
    raise OSError(fault_line) from error
