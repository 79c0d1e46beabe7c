"""What a run leaves for people to see: metrics.jsonl, training.log, args.json, a progress bar.

Only rank 0 writes; on the other ranks every call does nothing. wandb and TensorBoard are in
`reporters`, what a run does with what an earlier one left in `earlier_runs`.
"""

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from runtime import kernel_loader
from runtime.process.terminal import naming
from runtime.saving.store import save_file

MAX_SKIPPED = 20  # enough for the scale of float16 to come down from its start, 2 ** 14


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
        """Make the run's folder and its args.json.

        Args:
            folder: the run's folder, `out/full_sft_512`.
            args: flags, for args.json and wandb; `report_to` and `use_wandb` say where metrics go.
            enabled: True on rank 0.
            resumed_from: the checkpoint, None for a new run; see `earlier_runs.keep_earlier_run`.
            changes: what of the run's identity is another one from there on.

        Raises:
            ValueError: the folder cannot be written, or a reporter is not installed.
        """
        self.folder, self.args, self.enabled = folder, args, enabled
        self.report_to = {*args["report_to"]} | ({"wandb"} if args["use_wandb"] else set())
        self.resumed_from = resumed_from
        self.bar, self.reporters, self.began = None, None, math.inf
        if not enabled:
            return
        for name in sorted(self.report_to - {"none"}):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"--report_to {name}: it is not installed; pip install {name}")
        try:
            notes = self.open_folder(resumed_from, changes or {})
        except OSError as error:
            from runtime.process.exits import describe_error

            raise ValueError(f"--out_dir: cannot write to {describe_error(error)}") from None
        for note in notes:
            self.print(note)

    def open_folder(self, resumed_from: Path | None, changes: dict) -> list[str]:
        """Lock the run, keep what an earlier one left, write args.json; returns what to say."""
        folder, notes, history = self.folder, [], []
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock_run(folder)
        if resumed_from is not None:
            from runtime import earlier_runs

            history = earlier_runs.history_of(resumed_from, self.args, changes)
        goes_on = resumed_from is not None and folder.resolve() in resumed_from.resolve().parents
        left = (folder, *(folder.with_name(f"{folder.name}{end}") for end in (".pth", ".json")))
        if not goes_on and any(path.exists() for path in left):
            from runtime import earlier_runs

            notes += earlier_runs.keep_earlier_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = open(
            folder / "training.log", "a", encoding="utf-8", errors="backslashreplace"
        )
        args = json.dumps(self.args | {"history": history}, indent=2, default=str)
        save_file(folder / "args.json", f"{args}\n")
        if changes:
            notes.append(earlier_runs.describe_resume(resumed_from, changes))
        return notes

    def start(self, progress: dict, total_steps: int) -> None:
        """Begin, or go on behind a checkpoint: what the files say about later steps is taken back.

        Args:
            progress: the run's counters; `run_id`, its identity at wandb, is set here for a new
                run.
        """
        progress.setdefault("run_id", secrets.token_hex(4))
        progress["total_steps"] = total_steps
        if dist.is_initialized():
            from runtime.distributed import heartbeat

            heartbeat.follow(progress)
        self.first_step = step = progress["step"]
        if not self.enabled:
            return
        if self.resumed_from is not None:
            self.print(f"resumed from {self.resumed_from} behind step {step}")
        if line := kernel_loader.report():
            self.print(line)
        path = self.folder / "metrics.jsonl"
        if path.exists():
            from runtime import earlier_runs

            earlier_runs.drop_later_steps(path, step)
        self.metrics_file = open(path, "a", encoding="utf-8")
        self.total_steps = total_steps
        self.began = self.last_time = time.monotonic()
        self.last_tokens = progress["tokens"]
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)
        if names := self.report_to - {"none"}:
            from runtime.reporters import Reporters

            self.reporters = Reporters(self.print)
            self.reporters.start(names, self.folder, self.args, progress)

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
            speed = (tokens - self.last_tokens) / max(1e-9, now - self.last_time)
            metrics = metrics | {"tokens_per_sec": speed}
            self.last_time, self.last_tokens = now, tokens
        # JSON has no NaN; null keeps the file readable for every parser.
        line = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        append(self.metrics_file, json.dumps(line) + "\n")
        if self.reporters is not None:
            self.reporters.log(metrics)
        if "eval_loss" in metrics:
            values = (f"{k} {v:.4f}" for k, v in metrics.items() if k.startswith("eval_"))
            self.print(f"step {metrics['step']}/{self.total_steps} {' '.join(values)}")
        else:
            self.show_step(metrics)

    def show_step(self, metrics: dict) -> None:
        """A training line on the progress bar, or as text where there is none."""
        step, loss, lr, norm = (metrics[name] for name in ("step", "loss", "lr", "grad_norm"))
        rate = metrics["tokens_per_sec"] * metrics["supervised_tokens"] / metrics["tokens"]
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            shown = {"loss": f"{loss:.4f}", "lr": f"{lr:.2e}", "grad": f"{norm:.2f}"}
            self.bar.set_postfix(shown | {"sup_tok/s": f"{rate:,.0f}"})
            return
        per_step = (time.monotonic() - self.began) / max(1, step - self.first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total_steps - step)))
        self.print(
            f"epoch {metrics['epoch']} step {step}/{self.total_steps} loss {loss:.4f} lr {lr:.2e}"
            f" grad_norm {norm:.3f} {rate:,.0f} supervised tok/s left {left}"
        )

    def count_skipped(self, progress: dict, finite: bool, numbers: str) -> None:
        """Count and report a step that was skipped because of `numbers` that are not finite.

        All ranks call it at every step.

        Raises:
            FloatingPointError: the MAX_SKIPPED-th one in a row.
        """
        progress["skipped_in_a_row"] = 0 if finite else progress["skipped_in_a_row"] + 1
        progress["skipped"] += not finite
        if not finite:
            so_far = f"{progress['skipped']} skipped so far"
            self.print(f"step {progress['step']} skipped: {numbers} ({so_far})")
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
        """End the reporters and close the files."""
        if self.enabled:
            for part in (self.reporters, self.bar, self.metrics_file, self.log_file):
                if part is not None:
                    part.close()


def append(file, text: str) -> None:
    """Write to an open file, now. OSError: names the file."""
    with naming(file.name):
        file.write(text)
        file.flush()


def lock_run(folder: Path):
    """Hold the run's lock while this process lives, so that two never write to one folder.

    A run that was killed a moment ago may still be on its way out, hence the patience.
    """
    from filelock import FileLock, Timeout

    path, holder = (folder.with_name(f".{folder.name}.{end}") for end in ("lock", "pid"))
    lock = FileLock(path)
    try:
        with naming(path):
            lock.acquire(timeout=10)
    except Timeout:
        process = holder.read_text(encoding="utf-8") if holder.is_file() else "of someone else"
        advice = "stop it, or choose another --save_weight"
        raise ValueError(f"process {process} is writing to {folder}: {advice}") from None
    with naming(holder):  # beside it: on Windows nobody reads what is locked
        holder.write_text(str(os.getpid()), encoding="utf-8")
    return lock
