"""Does DPO work: held-out preferences, and what is left of every other skill, before and after it.

Trains the model of scripts/quickstart.sh on dataset/demo/preferences.jsonl as a user would. Prints
the share of held-out pairs whose chosen answer has the higher reward (the log-ratio of the policy
to the model it started from), the share whose chosen answer is simply the likelier one, and exact
match on the held-out prompts of every task, before and after. Ends with exit code 0 if the first
share is at least 95 % and no task has lost more than 3 points.

    python benchmarks/dpo.py
    python benchmarks/dpo.py --loss_type ipo --beta 0.5     # more flags go to trainer/train_dpo.py
"""

import sys
import tempfile
from pathlib import Path

import torch
from demo_model import DEMO, SHAPE, TOKENIZER, arguments, exact_match, metrics, run

from dataset.lm_dataset import load_tokenizer
from dataset.preference_dataset import PreferenceDataset
from model.preference_loss import logps_of
from model.weights import load_model

PAIRS = DEMO / "preferences_held_out.jsonl"
RECIPE = (
    "--batch_size 4 --epochs 2 --learning_rate 5e-5 --beta 1 --sft_weight 1 --cache_reference 1"
)


@torch.no_grad()
def likelier(weights: Path, scratch: Path) -> float:
    """Share of the held-out pairs whose chosen answer has the higher log-probability, in
    percent."""
    tokenizer = load_tokenizer(TOKENIZER)
    pairs, model = PreferenceDataset(PAIRS, tokenizer, 256, scratch / "cache"), load_model(weights)
    logps = torch.cat(
        [logps_of(model, *pairs.collate([pairs[row]]), "cpu")[0] for row in range(len(pairs))]
    )
    return 100 * (logps[:, 0] > logps[:, 1]).float().mean().item()


def main() -> int:
    args, more = arguments(__doc__).parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        trained, cache = scratch / "dpo_192.pth", scratch / "cache"
        before = exact_match(scratch, "held_out", "--weight", args.weight)
        flags = [
            *SHAPE,
            *RECIPE.split(),
            "--out_dir",
            scratch,
            "--cache_dir",
            cache,
            "--eval_data",
            PAIRS,
        ]
        seconds = run("trainer/train_dpo.py", *flags, "--from_weight", args.weight.resolve(), *more)
        steps = metrics(scratch / "dpo_192")
        after = exact_match(scratch, "held_out", "--weight", trained)
        plain = [likelier(path, scratch) for path in (args.weight, trained)]
    accuracy = 100 * steps[-1]["eval_accuracy"]
    print(f"\ntrained in {seconds:.0f} s; first loss {steps[0]['loss']:.7f}")
    print(f"held-out preference accuracy by reward {accuracy:.1f} %, margin {steps[-1]['eval_margin']:.2f}; "
          f"chosen is likelier in {plain[0]:.1f} % of the pairs before and {plain[1]:.1f} % after")  # fmt: skip
    for task, value in before.items():
        print(
            f"{task:12} exact match {value:5.1f} % before, {after[task]:5.1f} % after,"
            f" {after[task] - value:+5.1f}"
        )
    lost = max(before[task] - after[task] for task in before)
    print(f"the most that a task has lost: {lost:.1f} points")
    return 0 if accuracy >= 95 and lost <= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
