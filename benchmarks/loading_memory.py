"""Peak memory of loading a model of SmolLM2-135M's shape, over a process that imported torch.

Each format is loaded in a process of its own; what counts is the highest resident set, pages of
memory maps included. The goal: 1.2 times the size of the float32 weights.

    python benchmarks/loading_memory.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.hf import config_to_hf
from model.lm import LMConfig, MiniMindLM

SHAPE = dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152)
FORMATS = ("safetensors", "shards", "bfloat16", "pytorch_model.bin")
LIMIT = 1.2
LOAD = """
import re, sys
import torch
def peak():  # of this program alone: getrusage's includes the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
if sys.argv[1] != "nothing":
    from pathlib import Path
    from model.weights import load_model
    model = load_model(Path(sys.argv[1]))
print(peak() - before)
"""


def write(model: MiniMindLM, folder: Path, kind: str) -> Path:
    """Write the model in a format; returns the folder."""
    from safetensors.torch import save_file

    folder.mkdir()
    state = {n: v.clone() for n, v in model.state_dict().items() if n != "lm_head.weight"}
    if kind == "bfloat16":
        state = {name: value.bfloat16() for name, value in state.items()}
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    if kind == "pytorch_model.bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "shards":
        names = list(state)
        parts = [names[: len(names) // 2], names[len(names) // 2 :]]
        weight_map = {
            name: f"model-{i}.safetensors" for i, part in enumerate(parts) for name in part
        }
        for i, part in enumerate(parts):
            save_file({name: state[name] for name in part}, folder / f"model-{i}.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(state, folder / "model.safetensors")
    return folder


def measure(path: str) -> tuple[int, float]:
    """Bytes at the peak, and seconds, of a process that loads it."""
    begin = time.perf_counter()
    words = [sys.executable, "-c", LOAD, path]
    answer = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(answer), time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--layers", type=int, default=SHAPE["n_layers"])
    args = parser.parse_args()
    options = {**SHAPE, "n_layers": args.layers, "max_seq_len": 8192}
    model = MiniMindLM(LMConfig(**options, qk_norm=False, norm_eps=1e-5))
    size = sum(p.numel() * 4 for p in model.parameters())
    _, start = measure("nothing")
    print(f"{size / 2**20:.0f} MiB of float32 weights; at most {LIMIT} times that", flush=True)
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in args.formats:
            peak, seconds = measure(str(write(model, Path(scratch) / kind, kind)))
            figure = f"{peak / size:.3f} times its size, {seconds - start:.1f} s"
            print(f"{kind:18} {peak / 2**20:6.0f} MiB, {figure}", flush=True)
            missed += [kind] if peak > LIMIT * size else []
    if missed:
        print(f"missed: {' '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
