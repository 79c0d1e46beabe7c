"""What a run leaves for people to see: metrics.jsonl, training.log, args.json, lines on a terminal.

Only rank 0 writes; on the other ranks every call does nothing. A terminal's `progress_bar` and
`reporters`, wandb and TensorBoard, are made where they are wanted; what a run does with what an
earlier one left is in `earlier_runs`.
"""

import json
import math
import os
import secrets
import sys
import time
from pathlib import Path

import torch.distributed as dist

from runtime import kernel_loader
from runtime.saving.store import naming, save_file


class Tracker:
    """Writes what is logged to all places at once.

    Attributes:
        first_step: the step behind which this process began, on every rank.
    """

    def __init__(
        self,
        folder: Path,
        args: dict,
        enabled: bool,
        resumed_from: Path | None,
        changes: dict | None = None,
    ):
        """Lock the run's folder, keep what an earlier run left there, write args.json.

        Args:
            folder: the run's folder, `out/full_sft_512`.
            args: flags, for args.json and wandb; `report_to` and `use_wandb` say where metrics go.
            enabled: True on rank 0.
            resumed_from: the checkpoint, None for a new run.
            changes: what of the run's identity is another one from there on.

        Raises:
            ValueError: the folder cannot be written, or a reporter is not installed.
        """
        self.folder, self.args, self.enabled = folder, args, enabled
        self.resumed_from = resumed_from
        self.report_to = {*args["report_to"], "wandb" if args["use_wandb"] else "none"} - {"none"}
        self.bar, self.reporters, self.began = None, None, math.inf
        if not enabled:
            return
        if self.report_to:
            from runtime.reporters import Reporters

            self.reporters = Reporters(self.report_to, self.print)
        history, notes = [], []
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock = lock_run(folder)
            earlier = [p for p in folder.parent.iterdir() if p.name.startswith(folder.name)]
            if earlier or resumed_from is not None:
                from runtime import earlier_runs

                history, notes = earlier_runs.take_over(folder, args, resumed_from, changes or {})
            folder.mkdir(parents=True, exist_ok=True)
            self.log_file = open_lines(folder / "training.log")
            text = json.dumps(args | {"history": history}, indent=2, default=str)
            save_file(folder / "args.json", f"{text}\n")
        except OSError as error:
            from runtime.process.errors import describe_error

            raise ValueError(f"--out_dir: cannot write to {describe_error(error)}") from None
        for note in notes:
            self.print(note)

    def start(self, progress: dict, total_steps: int) -> None:
        """Begin, or go on behind a checkpoint: what the files say about later steps is taken back.

        Args:
            progress: the run's counters; `run_id`, its identity at wandb, is set here for a new
                run.
        """
        progress.setdefault("run_id", secrets.token_hex(4))
        progress["total_steps"] = self.total_steps = total_steps
        if dist.is_initialized():
            from runtime.distributed import heartbeat

            heartbeat.follow(progress)
        self.first_step = progress["step"]
        if not self.enabled:
            return
        metrics_path = self.folder / "metrics.jsonl"
        if self.resumed_from is not None:
            from runtime import earlier_runs

            self.print(f"resumed from {self.resumed_from} behind step {self.first_step}")
            earlier_runs.drop_later_steps(metrics_path, self.first_step)
        if line := kernel_loader.report():
            self.print(line)
        self.metrics_file = open_lines(metrics_path)
        self.began = self.last_time = time.monotonic()
        self.last_tokens = progress["tokens"]
        if sys.stderr.isatty():
            from runtime.progress_bar import open_bar

            self.bar = open_bar(total_steps, self.first_step)
        if self.reporters is not None:
            self.reporters.start(self.folder, self.args, progress)

    def print(self, text: str) -> None:
        """A line for people: on the terminal and in training.log."""
        if not self.enabled:
            return
        say = print if self.bar is None else self.bar.write
        say(text)
        sys.stdout.flush()
        with naming(self.log_file.name):
            self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

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
            speed = (tokens - self.last_tokens) / max(1e-9, now - self.last_time)
            metrics = metrics | {"tokens_per_sec": speed}
            self.last_time, self.last_tokens = now, tokens
        # JSON has no NaN; null keeps the file readable for every parser.
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        with naming(self.metrics_file.name):
            self.metrics_file.write(f"{json.dumps(line)}\n")
        if self.reporters is not None:
            self.reporters.log(metrics)
        if "eval_loss" in metrics:
            values = (f"{k} {v:.4f}" for k, v in metrics.items() if k.startswith("eval_"))
            self.print(f"step {metrics['step']}/{self.total_steps} {' '.join(values)}")
        else:
            self.show_step(metrics)

    def show_step(self, metrics: dict) -> None:
        """A training line on the progress bar, or as text where there is none."""
        rate = metrics["tokens_per_sec"] * metrics["supervised_tokens"] / metrics["tokens"]
        if self.bar is not None:
            from runtime.progress_bar import show_step

            show_step(self.bar, metrics, rate)
            return
        step = metrics["step"]
        per_step = (time.monotonic() - self.began) / max(1, step - self.first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total_steps - step)))
        self.print(
            f"epoch {metrics['epoch']} step {step}/{self.total_steps} loss {metrics['loss']:.4f}"
            f" lr {metrics['lr']:.2e} grad_norm {metrics['grad_norm']:.3f}"
            f" {rate:,.0f} supervised tok/s left {left}"
        )

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk, before a checkpoint that vouches for it."""
        if self.enabled:
            with naming(self.metrics_file.name):
                os.fsync(self.metrics_file.fileno())

    def close(self) -> None:
        """End the reporters and close the files."""
        if self.enabled:
            for part in (self.reporters, self.bar, self.metrics_file, self.log_file):
                if part is not None:
                    part.close()


def open_lines(path: Path):
    """A file to which lines are appended; each is written at once."""
    return open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")


def lock_run(folder: Path):
    """Hold the run's lock while this process lives, so that two never write to one folder.

    A run that was killed a moment ago may still be on its way out, hence the patience.
    """
    from filelock import FileLock, Timeout

    path, holder = (folder.with_name(f".{folder.name}.{end}") for end in ("lock", "pid"))
    lock = FileLock(path)
    try:
        lock.acquire(timeout=10)
    except Timeout:
        process = holder.read_text(encoding="utf-8") if holder.is_file() else "of someone else"
        advice = "stop it, or choose another --save_weight"
        raise ValueError(f"process {process} is writing to {folder}: {advice}") from None
    with naming(holder):  # beside it: on Windows nobody reads what is locked
        holder.write_text(str(os.getpid()), encoding="utf-8")
    return lock
