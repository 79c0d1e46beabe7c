"""Does GRPO work: exact match on held-out prompts of a task that the model of scripts/quickstart.sh is bad at.

The task (`ties` in dataset/make_demo.py) is to sort three numbers of two digits; in half of the prompts two begin with
the same digit, as they never do in the SFT data. Makes prompts enough that none is learned by heart, trains as a user
would, and prints the share of dataset/demo/rl_held_out.jsonl that is answered exactly, greedily, before and after. Ends
with exit code 0 if it rises from at most 60 % to at least 90 %.

    python benchmarks/grpo.py
    python benchmarks/grpo.py --loss_type gspo --max_steps 50     # more flags go to trainer/train_grpo.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """--dim 192 --n_layers 4 --n_heads 6 --n_kv_heads 3 --max_seq_len 256 --device cpu --dtype float32
    --save_interval 0 --epochs 9 --max_steps 200 --batch_size 64 --group_size 8 --max_new_tokens 16 --temperature 1.5
    --optimizer muon --learning_rate 1.5e-3 --sample_interval 50"""
FROM, TO = 60.0, 90.0


def run(script: str, *flags) -> None:
    """Run a script of the project; what it prints is shown."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True)


def exact_match(weights: Path, scratch: Path) -> float:
    """Percent of the held-out prompts that the model answers exactly."""
    out = scratch / f"{weights.stem}.jsonl"
    run("eval_model.py", "--weight", weights, "--eval_file", ROOT / "dataset/demo/rl_held_out.jsonl", "--eval_out", out)
    right = [json.loads(line)["right"] for line in out.read_text(encoding="utf-8").splitlines()]
    return 100 * sum(right) / len(right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", type=Path, default=ROOT / "out/full_sft_192.pth", help="the model to start from")
    parser.add_argument("--prompts", type=int, default=4000, help="prompts to learn from")
    args, more = parser.parse_known_args()
    weights = args.weight.resolve()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        run("dataset/make_demo.py", "--out_dir", scratch / "data", "--rl_prompts", args.prompts)
        before, began = exact_match(weights, scratch), time.monotonic()
        places = ("--data_path", scratch / "data/rl_prompts.jsonl", "--out_dir", scratch, "--from_weight", weights)
        run("trainer/train_grpo.py", *RECIPE.split(), *places, *more)
        seconds = time.monotonic() - began
        after = exact_match(scratch / "grpo_192.pth", scratch)
    print(f"GRPO, {seconds:.0f} s: exact match on held-out prompts {before:.1f} % -> {after:.1f} %")
    return 0 if before <= FROM and after >= TO else 1


if __name__ == "__main__":
    sys.exit(main())
