"""A run as it lies on the disk: finding it by its name, and reading what it left."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.reporting.curves import Metrics, read_metrics
from runtime.reporting.run_log import RunLog, read_log

METRICS = "metrics.jsonl"


@dataclass
class RunRecord:
    """What a run left, or has written so far."""

    name: str
    path: Path  # of its metrics.jsonl
    metrics: Metrics
    log: RunLog
    flags: dict  # of args.json, {} where there is none
    shape: dict  # of the model, {} where there is none
    is_running: bool

    @property
    def state(self) -> str:
        """How the run stands, in words."""
        if self.log.ending:  # first: who writes a page at the end of a run still has its lock
            return self.log.ending
        if self.is_running:
            return "running"
        return "ended early: killed, or failed" if self.log.starts else "unknown: no training.log"

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(max((curve.steps[-1] for curve in self.metrics.curves.values()), default=0))


def find_run(name: str, out_dir: Path) -> Path:
    """The metrics.jsonl of a run.

    Args:
        name: of a run (`full_sft_512`) in `out_dir`, or a stage (`full_sft`): its newest run; a
            run's folder, its weights, or the file itself.

    Raises:
        ValueError: there is no such run.
    """
    path = Path(name)
    if path.is_file() and path.suffix != ".pth":
        return path
    folders = [path.with_suffix("") if path.suffix == ".pth" else path, out_dir / name]
    for folder in folders:
        if (folder / METRICS).is_file():
            return folder / METRICS
    runs = sorted(file.parent.name for file in out_dir.glob(f"*/{METRICS}"))
    of_stage = [run for run in runs if re.fullmatch(re.escape(name) + r"_\d+(_moe)?", run)]
    if of_stage:
        files = [out_dir / run / METRICS for run in of_stage]
        return max(files, key=lambda file: file.stat().st_mtime)
    if path.is_dir():
        raise ValueError(f"{name}: there is no {METRICS} in it: name the folder of a run")
    known = f"those there: {', '.join(runs[:20])}" if runs else "there is none"
    raise ValueError(f"{name}: no run of this name in {out_dir} ({known}), and no such file")


def read_run(path: Path) -> RunRecord:
    """Read a run by its metrics.jsonl; what lies beside it may be missing."""
    folder = path.resolve().parent
    return RunRecord(
        name=folder.name if path.name == METRICS else path.stem,
        path=path,
        metrics=read_metrics(path),
        log=read_log(folder / "training.log"),
        flags=read_object(folder / "args.json"),
        shape=read_object(folder.with_name(f"{folder.name}.json")),
        is_running=is_locked(folder),
    )


def read_object(path: Path) -> dict:
    """An object of JSON; {} where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a run, see `tracking.lock_run`, who waits for ours."""
    from filelock import FileLock, Timeout

    path = folder.with_name(f".{folder.name}.lock")
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder of someone else
        return False


def name_apart(runs: list[RunRecord]) -> None:
    """Give runs of the same name longer ones, by their folders."""
    for run in runs:
        folder = run.path.resolve().parent
        same = [other for other in runs if other.path.resolve().parent.name == folder.name]
        if len(same) > 1:
            run.name = "/".join(folder.parts[-2:])
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
