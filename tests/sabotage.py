"""Run a script with something going wrong on one rank: sabotage.py PHASE RANK SCRIPT ARGS.

PHASE: data, model, forward, rollout, clip, step, evaluation, save, end: the rank raises there (in
the loop: at its
       third step);
       reader: one of its processes of --num_workers raises; mistake: a ValueError; killed: it is
       ended by kill -9; weight: the rank changes one of its weights behind the second step;
       hang: the rank waits in its third step for a file that nobody writes, as on a file system
       that hangs; nan, flip: what the rank holds of a gradient changes behind the third exchange,
       to NaN or to a finite number.
A process that no launcher started is rank 0. With --max_restarts only the first attempt goes wrong.
"""

import math
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

import dataset.packing  # noqa: E402
from dataset.cached_dataset import CachedDataset  # noqa: E402
from model.lm import MiniMindLM  # noqa: E402
from runtime import checkpoint, evaluation, parallel
from runtime.device import local  # noqa: E402
from runtime.rl import sampler  # noqa: E402
from runtime.tracking import Tracker  # noqa: E402

PLACES = {
    "data": (dataset.packing, "split_rows", 1),
    "model": (parallel, "wrap", 1),
    "forward": (MiniMindLM, "layout", 3),
    "hang": (MiniMindLM, "layout", 3),
    "rollout": (sampler, "rollout_metrics", 1),
    "clip": (parallel, "clip_gradients", 3),
    "evaluation": (evaluation, "sum_over_rows", 1),
    "save": (checkpoint, "save_run", 1),
    "end": (Tracker, "close", 1),
    "reader": (CachedDataset, "__getitem__", 3),
    "mistake": (CachedDataset, "__getitem__", 3),
    "killed": (CachedDataset, "__getitem__", 3),
    "weight": (parallel, "clip_gradients", 3),
    "nan": (parallel, "clip_gradients", 3),
    "flip": (parallel, "clip_gradients", 3),
}
GRADIENTS = {"nan": math.nan, "flip": 0.1}


def sabotage(phase: str) -> None:
    if phase == "step":
        optimizer_steps = iter(range(1, 4))

        def fail(*args) -> None:
            if next(optimizer_steps) == 3:
                raise RuntimeError("sabotage in step")

        register_optimizer_step_pre_hook(fail)
        return
    place, name, at = PLACES[phase]
    original, calls = getattr(place, name), []

    def wrong(*args, **kwargs):
        if name != "__getitem__" or multiprocessing.parent_process():  # in a reader
            calls.append(name)
        if len(calls) == at and phase == "weight":
            with torch.no_grad():
                parallel.unwrap(args[0]).model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
        elif len(calls) == at and phase == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif len(calls) == at and phase in GRADIENTS:
            p = next(
                p for p in args[0].parameters() if p.grad is not None and local(p.grad).numel()
            )
            local(p.grad).view(-1)[0] = GRADIENTS[phase]
        elif len(calls) == at and phase == "hang":
            with tempfile.TemporaryDirectory() as folder:
                os.mkfifo(Path(folder) / "file")
                (Path(folder) / "file").read_bytes()
        elif len(calls) == at:
            raise (ValueError if phase == "mistake" else RuntimeError)(f"sabotage in {phase}")
        return original(*args, **kwargs)

    setattr(place, name, wrong)


if __name__ == "__main__":
    phase, rank, *sys.argv = sys.argv[1:]
    if (
        os.environ.get("RANK", "0") == rank
        and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    ):
        sabotage(phase)
    runpy.run_path(sys.argv[0], run_name="__main__")
