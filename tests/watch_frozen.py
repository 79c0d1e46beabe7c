"""Run a stage script; at every wait for its writer, print the hash of the frozen weights.

torchrun --nproc_per_node 2 tests/watch_frozen.py SCRIPT ARGS
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weight_hash import hash_weights
from runtime import checkpoint, parallel

wrap, wait, wrapped = parallel.wrap, checkpoint.wait, []


def keep(*args):
    wrapped.append(wrap(*args))
    return wrapped[-1]


def print_hash() -> None:
    wait()
    state = {n: p for n, p in parallel.unwrap(wrapped[0]).state_dict().items() if ".lora_" not in n}
    whole = {name: p.full_tensor() if parallel.is_sharded(p) else p for name, p in state.items()}
    print("frozen weights", hash_weights(whole), flush=True)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    parallel.wrap, checkpoint.wait = keep, print_hash
    runpy.run_path(sys.argv[0], run_name="__main__")
