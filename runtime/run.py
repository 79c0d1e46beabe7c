"""A training run: what the loop of a stage works with, and the bookkeeping of all stages."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from runtime import checkpoint, parallel
from runtime.launch import StopSignal
from runtime.tracking import Tracker


@dataclass
class Run:
    """One training run, as this process has it."""

    args: Any  # flags; and device, total_steps and peak_lr, which `main` has worked out
    model: nn.Module  # wrapped: what a forward pass goes through
    tracker: Tracker  # metrics.jsonl, training.log, progress bar, wandb
    progress: dict  # counters, saved with checkpoints: epoch, step_in_epoch, step, tokens, skipped
    save: Callable[[], None]  # writes a checkpoint and the weights; all ranks call it
    # An engine may have an optimizer, a scaler, a precision and trackers of its own.
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None  # switched off, but for float16
    autocast: AbstractContextManager = field(default_factory=nullcontext)  # around forward passes
    engine_log: Callable[[dict], None] | None = None  # instead of the tracker's
    stop: StopSignal = field(default_factory=StopSignal)  # the signal to stop, once all ranks agree

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.progress["step"]

    @property
    def is_done(self) -> bool:
        """Whether the last optimizer step of the run is behind us."""
        return self.step >= self.args.total_steps

    def has_passed(self, interval: int, steps: int = 1) -> bool:
        """Whether a multiple of `interval` lies in the last `steps` steps; 0 has none."""
        return interval > 0 and self.step // interval > (self.step - steps) // interval

    def is_due(self, interval: int, steps: int = 1) -> bool:
        """Whether something is due that happens every `interval` steps, and at the end."""
        return self.is_done or self.has_passed(interval, steps)

    def count_step(self, tokens: int, is_finite: bool, loss: float, grad_norm: float) -> None:
        """Count an optimizer step and its tokens over all ranks; report one that was skipped.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        self.progress["step"] += 1
        self.progress["tokens"] += tokens
        if is_finite:
            self.progress["skipped_in_a_row"] = 0
            return
        from runtime.skipped_steps import count_skipped

        numbers = f"loss {loss}, gradient norm {grad_norm}"
        count_skipped(self.progress, numbers, self.tracker.print)

    def log(self, metrics: dict) -> None:
        """A line of metrics.jsonl, which holds `step`, and the same to other trackers."""
        (self.engine_log or self.tracker.log)(metrics)

    def log_step(self, metrics: dict[str, float]) -> None:
        """Log a step: every --log_interval-th, the first and the last one of a run."""
        if self.step == 1 or self.is_due(self.args.log_interval):
            counted = {"step": self.step, "epoch": self.progress["epoch"] + 1}
            self.log(counted | metrics | {"total_tokens": self.progress["tokens"]})

    def end_step(self, stopping: float) -> bool:
        """End a step of a plan: compare replicas, save if it is due. True: leave the loop.

        Args:
            stopping: sum of the signals that all ranks have received.
        """
        self.progress["step_in_epoch"] += 1
        self.stop.sync_stop(stopping)
        parallel.check_replicas(self.model, self.step, self.args.replica_check)
        return self.save_if_due(stopping)

    def save_if_due(self, stopping: float, steps: int = 1) -> bool:
        """Save every --save_interval steps, of which `steps` are new, at the end, on a signal."""
        if stopping or self.is_due(self.args.save_interval, steps):
            self.save()
        return bool(stopping) or self.is_done

    def finish(self, result: str) -> int:
        """Wait for what is being written, say how the run ended; returns the exit code."""
        checkpoint.wait()
        number = self.stop.number
        ending = f"stopped by signal {number} at step {self.step}" if number else "finished"
        self.tracker.print(f"{ending}; {result}")
        # A page of curves takes a second or two: a short try should not wait for it.
        if not number and time.monotonic() - self.tracker.began > 60:
            from runtime.reporting.page import write_at_end

            write_at_end(self.tracker.folder, self.tracker.print)
        self.tracker.close()
        return 128 + number if number else 0
