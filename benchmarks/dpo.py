"""Does DPO work: held-out preferences, and what is left of every other skill, before and after it.

Trains the model of scripts/quickstart.sh on dataset/demo/preferences.jsonl as a user would. Prints the share of
held-out pairs whose chosen answer has the higher reward (the log-ratio of the policy to the model it started from), the
share whose chosen answer is simply the likelier one, and exact match on the held-out prompts of every task, before and
after. Ends with exit code 0 if the first share is at least 95 % and no task has lost more than 3 points.

    python benchmarks/dpo.py
    python benchmarks/dpo.py --loss_type ipo --beta 0.5     # more flags go to trainer/train_dpo.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import load_tokenizer
from dataset.preference_dataset import PreferenceDataset
from model.weights import load_model
from runtime.reference import logps_of

PAIRS = ROOT / "dataset/demo/preferences_held_out.jsonl"
RECIPE = """--dim 192 --n_layers 4 --n_heads 6 --n_kv_heads 3 --max_seq_len 256 --device cpu --save_interval 0
    --batch_size 4 --epochs 2 --learning_rate 5e-5 --beta 1 --sft_weight 1 --cache_reference 1"""


def run(script: str, *flags) -> None:
    """Run a script of the project; what it prints is shown."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True)


def exact_match(weights: Path, scratch: Path) -> dict[str, float]:
    """Percent of the held-out prompts of each task that the model answers exactly."""
    out = scratch / f"{weights.stem}.jsonl"
    run("eval_model.py", "--weight", weights, "--eval_file", ROOT / "dataset/demo/held_out.jsonl", "--eval_out", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    asked, right = (Counter(row["task"] for row in rows if row["right"] >= least) for least in (False, True))
    return {task: 100 * right[task] / asked[task] for task in sorted(asked)}


@torch.no_grad()
def likelier(weights: Path, scratch: Path) -> float:
    """Share of the held-out pairs whose chosen answer has the higher log-probability, in percent."""
    tokenizer = load_tokenizer(ROOT / "model/minimind_tokenizer")
    pairs, model = PreferenceDataset(PAIRS, tokenizer, 256, scratch / "cache"), load_model(weights)
    logps = torch.cat([logps_of(model, *pairs.collate([pairs[row]]), "cpu")[0] for row in range(len(pairs))])
    return 100 * (logps[:, 0] > logps[:, 1]).float().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", type=Path, default=ROOT / "out/full_sft_192.pth", help="the model to start from")
    args, more = parser.parse_known_args()
    weights = args.weight.resolve()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        before = exact_match(weights, scratch)
        flags = f"{RECIPE} --out_dir {scratch} --cache_dir {scratch / 'cache'} --eval_data {PAIRS}"
        began = time.monotonic()
        run("trainer/train_dpo.py", *flags.split(), "--from_weight", weights, *more)
        seconds = time.monotonic() - began
        metrics = [json.loads(line) for line in (scratch / "dpo_192/metrics.jsonl").read_text().splitlines()]
        after = exact_match(scratch / "dpo_192.pth", scratch)
        plain = [likelier(path, scratch) for path in (weights, scratch / "dpo_192.pth")]
    accuracy = 100 * metrics[-1]["eval_accuracy"]
    print(f"\ntrained in {seconds:.0f} s; first loss {metrics[0]['loss']:.7f}")
    print(f"held-out preference accuracy by reward {accuracy:.1f} %, margin {metrics[-1]['eval_margin']:.2f}; "
          f"chosen is likelier in {plain[0]:.1f} % of the pairs before and {plain[1]:.1f} % after")  # fmt: skip
    for task, value in before.items():
        print(f"{task:12} exact match {value:5.1f} % before, {after[task]:5.1f} % after, {after[task] - value:+5.1f}")
    lost = max(before[task] - after[task] for task in before)
    print(f"the most that a task has lost: {lost:.1f} points")
    return 0 if accuracy >= 95 and lost <= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
