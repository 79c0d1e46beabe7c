"""Run a script with something going wrong on one rank: sabotage.py PHASE RANK SCRIPT ARGS

PHASE: data, model, forward, clip, save: the rank raises there (in the loop: at its third step);
       weight: the rank changes one of its weights behind the second step;
       hang: the rank waits in its third step for a file that nobody writes, as on a file system that hangs;
       nan, flip: what the rank holds of a gradient changes behind the third exchange, to NaN or to a finite number.
"""

import math
import os
import runpy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import dataset.packing  # noqa: E402
from model.lm import MiniMindLM  # noqa: E402
from runtime import checkpoint, parallel  # noqa: E402
from runtime.device import local  # noqa: E402

PLACES = {
    "data": (dataset.packing, "split_rows", 1),
    "model": (parallel, "wrap", 1),
    "forward": (MiniMindLM, "layout", 3),
    "hang": (MiniMindLM, "layout", 3),
    "clip": (parallel, "clip_gradients", 3),
    "save": (checkpoint, "save_run", 1),
    "weight": (parallel, "clip_gradients", 3),
    "nan": (parallel, "clip_gradients", 3),
    "flip": (parallel, "clip_gradients", 3),
}
GRADIENTS = {"nan": math.nan, "flip": 0.1}


def sabotage(phase: str) -> None:
    place, name, at = PLACES[phase]
    original, calls = getattr(place, name), []

    def wrong(*args, **kwargs):
        calls.append(name)
        if len(calls) == at and phase == "weight":
            with torch.no_grad():
                parallel.unwrap(args[0]).model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
        elif len(calls) == at and phase in GRADIENTS:
            p = next(p for p in args[0].parameters() if p.grad is not None and local(p.grad).numel())
            local(p.grad).view(-1)[0] = GRADIENTS[phase]
        elif len(calls) == at and phase == "hang":
            with tempfile.TemporaryDirectory() as folder:
                os.mkfifo(Path(folder) / "file")
                (Path(folder) / "file").read_bytes()
        elif len(calls) == at:
            raise RuntimeError(f"sabotage in {phase}")
        return original(*args, **kwargs)

    setattr(place, name, wrong)


if __name__ == "__main__":
    phase, rank, *sys.argv = sys.argv[1:]
    if os.environ["RANK"] == rank:
        sabotage(phase)
    runpy.run_path(sys.argv[0], run_name="__main__")
