"""What a run leaves for people to see: metrics.jsonl, training.log, args.json, a progress bar,
wandb, TensorBoard.

Only rank 0 writes; on the other ranks every call does nothing.
"""

import fcntl
import importlib.util
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from runtime import kernel_loader
from runtime.distributed import heartbeat
from runtime.identity import told
from runtime.store import save_file
from runtime.terminal import describe_error, naming, replace_surrogates

MAX_SKIPPED = 20  # enough for the scale of float16 to come down from its start, 2 ** 14


class Tracker:
    """Writes what is logged to all places at once.

    Attributes:
        failed: the names of the trackers that raised something; training goes on without them.
        first_step: the step behind which this process began, on every rank.
    """

    def __init__(
        self,
        folder: Path,
        args: dict,
        enabled: bool,
        found: Path | None,
        changes: dict | None = None,
    ):
        """
        Args:
            folder: the run's folder, `out/full_sft_512`.
            args: flags, for args.json and wandb; `report_to` and `use_wandb` say where metrics go.
            enabled: True on rank 0.
            found: the checkpoint that the run goes on from, None for a new run; see
            `keep_earlier_run`. changes: what of the run's identity is another one from there on,
            see `identity.changes_between`.

        Raises:
            ValueError: the folder cannot be written, or a tracker is not installed.
        """
        self.failed: set[str] = set()
        self.folder, self.args, self.enabled = folder, args, enabled
        self.report_to = {*args["report_to"]} | ({"wandb"} if args["use_wandb"] else set())
        self.bar, self.wandb, self.board = None, None, None
        if not enabled:
            return
        for name in sorted(self.report_to - {"none"}):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"--report_to {name}: it is not installed; pip install {name}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock = lock_run(folder)
            goes_on = found is not None and folder.resolve() in found.resolve().parents
            history = history_of(found, args, changes or {})
            kept = None if goes_on else keep_earlier_run(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.log_file = open(
                folder / "training.log", "a", encoding="utf-8", errors="backslashreplace"
            )
            save_file(
                folder / "args.json",
                json.dumps(args | {"history": history}, indent=2, default=str) + "\n",
            )
        except OSError as error:
            text = describe_error(error).removeprefix("cannot write ")
            raise ValueError(f"--out_dir: cannot write to {text}") from None
        if kept is not None:
            remedy = f"to remove all that is kept so: rm -r {folder}.previous*"
            self.print(f"what an earlier {folder.name} left is kept in {kept}; {remedy}")
        if changes:
            self.print(f"--resume_with_changes: from {found.name} on {told(changes)}")

    def start(self, progress: dict, total_steps: int) -> None:
        """Begin, or go on behind a checkpoint: what the files say about later steps is taken back,
        the run repeats it.

        Args:
            progress: the run's counters; `run_id`, its identity at wandb, is set here for a new
            run.
        """
        progress.setdefault("run_id", secrets.token_hex(4))
        heartbeat.follow(progress)
        progress["total_steps"] = total_steps
        self.first_step = step = progress["step"]
        if not self.enabled:
            return
        if line := kernel_loader.report():
            self.print(line)
        self.metrics_file = truncated_metrics(self.folder / "metrics.jsonl", step)
        self.total_steps, self.began = total_steps, time.monotonic()
        self.last_time, self.last_tokens = self.began, progress["tokens"]
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
        if "wandb" in self.report_to:
            self.wandb = self.attempt(
                "wandb", start_wandb, self.folder, progress["run_id"], self.args
            )
        if "tensorboard" in self.report_to:
            self.board = self.attempt("tensorboard", start_tensorboard, self.folder, step)

    def attempt(self, tracker: str, function: Callable, *args, **kwargs) -> object:
        """Call a function of wandb or TensorBoard. Whatever it raises, training goes on, without
        that tracker."""
        if tracker in self.failed:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self.failed.add(tracker)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.print(f"warning: {tracker} failed, the run goes on without it: {reason}")
            return None

    def print(self, text: str) -> None:
        """A line for people: on the terminal and in training.log."""
        if not self.enabled:
            return
        tqdm.write(text)
        sys.stdout.flush()
        append(self.log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def log(self, metrics: dict) -> None:
        """A line of metrics.jsonl; floats in full precision.

        Args:
            metrics: holds `step`. A training line holds `total_tokens`, of which `tokens_per_sec`
            is made.
        """
        if not self.enabled:
            return
        if "total_tokens" in metrics:
            now, tokens = time.monotonic(), metrics["total_tokens"]
            metrics = metrics | {
                "tokens_per_sec": (tokens - self.last_tokens) / max(1e-9, now - self.last_time)
            }
            self.last_time, self.last_tokens = now, tokens
        # JSON has no NaN; null keeps the file readable for every parser.
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        append(self.metrics_file, json.dumps(line) + "\n")
        step = metrics["step"]
        values = {
            replace_surrogates(k): v for k, v in metrics.items() if k != "step" and v is not None
        }
        if self.wandb is not None:
            self.attempt("wandb", self.wandb.log, values, step=step)
        if self.board is not None:
            for name, value in values.items():
                self.attempt("tensorboard", self.board.add_scalar, name, value, step)
        if "eval_loss" in metrics:
            found = " ".join(
                f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_")
            )
            self.print(f"step {step}/{self.total_steps} {found}")
            return
        rate = metrics["tokens_per_sec"] * metrics["supervised_tokens"] / metrics["tokens"]
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            shown = {"loss": f"{metrics['loss']:.4f}", "lr": f"{metrics['lr']:.2e}"}
            shown |= {"grad": f"{metrics['grad_norm']:.2f}", "sup_tok/s": f"{rate:,.0f}"}
            self.bar.set_postfix(shown)
        else:
            per_step = (time.monotonic() - self.began) / max(1, step - self.first_step)
            left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total_steps - step)))
            self.print(
                f"epoch {metrics['epoch']} step {step}/{self.total_steps} loss"
                f" {metrics['loss']:.4f} lr {metrics['lr']:.2e} grad_norm"
                f" {metrics['grad_norm']:.3f} {rate:,.0f} supervised tok/s left {left}"
            )

    def count_skipped(self, progress: dict, finite: bool, found: str) -> None:
        """Count and report a step that was skipped because its loss or gradient was not finite. All
        ranks call it.

        Raises:
            FloatingPointError: the MAX_SKIPPED-th one in a row.
        """
        progress["skipped_in_a_row"] = 0 if finite else progress["skipped_in_a_row"] + 1
        progress["skipped"] += not finite
        if not finite:
            self.print(
                f"step {progress['step']} skipped: {found} ({progress['skipped']} skipped so far)"
            )
        if progress["skipped_in_a_row"] == MAX_SKIPPED:
            raise FloatingPointError(
                f"{MAX_SKIPPED} steps in a row had no finite gradient, the run stops; its weights"
                " and checkpoints are intact: lower --learning_rate, check the data, or use"
                " --dtype bfloat16"
            )

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk, before a checkpoint that vouches for it."""
        if self.enabled:
            with naming(self.metrics_file.name):
                os.fsync(self.metrics_file.fileno())

    def close(self) -> None:
        if not self.enabled:
            return
        if self.board is not None:
            self.attempt("tensorboard", self.board.close)
        if self.wandb is not None:
            self.attempt("wandb", self.wandb.finish)
        for part in (self.bar, self.metrics_file, self.log_file):
            if part is not None:
                part.close()


def history_of(found: Path | None, args: dict, changes: dict) -> list[dict]:
    """What args.json says about resumes with other flags: one entry each, the last one of this
    start.

    Args:
        found: the checkpoint that the run goes on from; what its run says of itself lies two
        folders above. changes: name -> [before, now], of more than flags.
    """
    if found is None:
        return []
    try:
        before = json.loads((found.parents[1] / "args.json").read_text())
        history = before.pop("history", [])
    except (
        OSError,
        ValueError,
        IndexError,
        AttributeError,
    ):  # copied elsewhere, or torn by a full disk
        before, history = {}, []
    now = json.loads(json.dumps(args, default=str))
    changed = {
        name: [before[name], now[name]]
        for name in now
        if name in before and before[name] != now[name]
    }
    changed |= {name.removeprefix("--"): values for name, values in changes.items()}
    changed = {name: values for name, values in changed.items() if not name.startswith("resume")}
    entry = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "resumed": found.name, "changed": changed}
    return [*history, entry] if changed else history


def append(file, text: str) -> None:
    """Write to an open file, now. OSError: names the file."""
    with naming(file.name):
        file.write(text)
        file.flush()


def keep_earlier_run(folder: Path) -> Path | None:
    """Move what an earlier run of this name left out of the way of a new one.

    The first one goes to `{folder}.previous`, the next ones to `{folder}.previous.2` and so on;
    nothing is deleted. Its weights go there, too, as links, and stay where they are until the new
    run saves its own: --from_weight may name them, and a run that fails before its first save
    leaves them in their place.

    Returns:
        The folder that it is in now; None where there was nothing.
    """
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


def lock_run(folder: Path):
    """Hold the run's lock as long as this process lives, so that two runs never write to one
    folder.

    A run that was killed a moment ago may still be on its way out, hence the patience.
    """
    lock = open(folder.with_name(f".{folder.name}.lock"), "a+")
    for _ in range(100):
        try:
            with naming(lock.name):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
            continue
        with naming(lock.name):
            lock.truncate(0)
            append(lock, str(os.getpid()))
        return lock
    lock.seek(0)
    raise ValueError(
        f"process {lock.read()} is writing to {folder}: stop it, or choose another --save_weight"
    )


def truncated_metrics(path: Path, step: int):
    """Open metrics.jsonl to append, with only the whole lines of steps up to `step` in it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and metrics_step(line) <= step]
    if kept != lines:
        temporary = path.with_name(f".tmp-{path.name}")
        with naming(temporary):
            temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
    return open(path, "a", encoding="utf-8")


def metrics_step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # not a line of ours


def start_tensorboard(folder: Path, step: int):
    """A writer below the run's folder; what an interrupted run wrote behind `step` is not shown."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def start_wandb(folder: Path, run_id: str, args: dict):
    """A wandb run: online with a login and a network, else offline. Never asks and never waits
    long."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_reachable() else "offline")
    settings = {
        "project": os.environ.get("WANDB_PROJECT", "minimind"),
        "name": folder.name,
        "id": run_id,
    }
    settings |= {"dir": str(folder), "config": args, "resume": "allow"}
    quiet = wandb.Settings(silent=True, init_timeout=20)
    try:
        return wandb.init(mode=mode, settings=quiet, **settings)
    except Exception as error:  # whatever the service or the key does, training goes on
        print(f"wandb: {error}; logging offline", file=sys.stderr)
        return wandb.init(mode="offline", settings=quiet, **settings)


def wandb_reachable() -> bool:
    """A key is known and the server answers."""
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
        return True
    except OSError:
        return False
