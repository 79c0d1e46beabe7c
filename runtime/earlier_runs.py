"""What a run does with the files that it, or an earlier one of its name, left."""

import json
import math
import os
import re
import shutil
import time
from pathlib import Path

from runtime.saving.identity_changes import describe_changes
from runtime.saving.store import naming


def take_over(
    folder: Path, args: dict, resumed_from: Path | None, changes: dict
) -> tuple[list[dict], list[str]]:
    """Keep what an earlier run left, unless this one goes on with it; see `Tracker`.

    Returns:
        The history for args.json, and what to say.
    """
    history, notes = [], []
    if resumed_from is not None:
        history = history_of(resumed_from, args, changes)
    if resumed_from is None or folder.resolve() not in resumed_from.resolve().parents:
        notes += keep_earlier_run(folder)
    if changes:
        notes.append(describe_resume(resumed_from, changes))
    return history, notes


def keep_earlier_run(folder: Path) -> list[str]:
    """Move what an earlier run of this name left out of the way of a new one; says so.

    The first one goes to `{folder}.previous`, the next ones to `{folder}.previous.2` and so on;
    nothing is deleted. Its weights go there, too, as links, and stay where they are until the new
    run saves its own: --from_weight may name them, and a run that fails before its first save
    leaves them in their place.
    """
    kept = move_earlier_run(folder)
    if kept is None:
        return []
    remedy = f"to remove all that is kept so: rm -r {folder}.previous*"
    return [f"what an earlier {folder.name} left is kept in {kept}; {remedy}"]


def move_earlier_run(folder: Path) -> Path | None:
    """The folder that an earlier run is in now; None where there was none, or it is kept already."""
    pattern = re.compile(re.escape(folder.name) + r"\.previous(?:\.(\d+))?")
    others = [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]
    weights = folder.with_name(f"{folder.name}.pth")
    is_kept = any(weights.exists() and same_file(path / weights.name, weights) for path in others)
    beside = [
        path
        for path in (weights, weights.with_name(f"{folder.name}.json"))
        if path.exists() and not is_kept
    ]
    if not folder.exists() and not beside:
        return None
    number = 1 + max((int(pattern.fullmatch(path.name)[1] or 1) for path in others), default=0)
    kept = folder.with_name(f"{folder.name}.previous" + (f".{number}" if number > 1 else ""))
    if folder.exists():
        os.rename(folder, kept)
    else:
        kept.mkdir()
    for path in beside:
        try:
            os.link(path, kept / path.name)
        except OSError:  # a file system without links
            shutil.copy2(path, kept / path.name)
    return kept


def same_file(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)


def history_of(checkpoint: Path, args: dict, changes: dict) -> list[dict]:
    """What args.json says about resumes with other flags: one entry each, the last of this start.

    Args:
        checkpoint: that the run goes on from; what its run says of itself lies two folders above.
        changes: name -> [before, now], of more than flags.
    """
    try:
        before = json.loads((checkpoint.parents[1] / "args.json").read_text())
        history = before.pop("history", [])
    except (OSError, ValueError, IndexError, AttributeError):
        before, history = {}, []  # copied elsewhere, or torn by a full disk
    now = json.loads(json.dumps(args, default=str))
    changed = {
        name: [before[name], now[name]]
        for name in now
        if name in before and before[name] != now[name]
    }
    changed |= {name.removeprefix("--"): values for name, values in changes.items()}
    changed = {name: values for name, values in changed.items() if not name.startswith("resume")}
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    entry = {"time": started, "resumed": checkpoint.name, "changed": changed}
    return [*history, entry] if changed else history


def describe_resume(checkpoint: Path, changes: dict) -> str:
    return f"--resume_with_changes: from {checkpoint.name} on {describe_changes(changes)}"


def drop_later_steps(path: Path, step: int) -> None:
    """Leave only the whole lines of steps up to `step` in metrics.jsonl, if there is one."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and metrics_step(line) <= step]
    if kept != lines:
        temporary = path.with_name(f".tmp-{path.name}")
        with naming(temporary):
            temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)


def metrics_step(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that is not ours."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
