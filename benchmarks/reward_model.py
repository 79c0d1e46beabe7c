"""Does the reward model work: how many held-out pairs it ranks right, and that a score belongs to
its text alone.

Trains a reward model from the model of scripts/quickstart.sh as a user would, and prints its
accuracy and margin on dataset/demo/preferences_held_out.jsonl. Ends with exit code 0 if at least 95
% of the held-out pairs are ranked right.

It learns from 2,400 pairs, which dataset/make_demo.py writes; the 480 in dataset/demo are the first
of them, and too few to learn which answer belongs to which question (--pairs 480).

    python benchmarks/reward_model.py
    python benchmarks/reward_model.py --pairs 480
    python benchmarks/reward_model.py --out out --epochs 4     # more flags go to trainer/train_reward.py
"""

import sys
import tempfile
from pathlib import Path

import torch
from demo_model import DEMO, SHAPE, TOKENIZER, arguments, metrics, run

from dataset.lm_dataset import load_tokenizer
from dataset.preference_dataset import PreferenceDataset
from model.reward import load_reward_model

PAIRS = DEMO / "preferences_held_out.jsonl"
RECIPE = "--batch_size 4 --epochs 3 --optimizer muon --learning_rate 1e-3 --dropout 0.1"


@torch.no_grad()
def packed_and_alone(weights: Path, scratch: Path) -> float:
    """The largest difference between the score of a text in one row with all others and its score
    alone."""
    pairs = PreferenceDataset(PAIRS, load_tokenizer(TOKENIZER), 256, scratch / "cache")
    model, samples = load_reward_model(weights), [pairs[row] for row in range(len(pairs))]
    X, _, _, doc_lens = pairs.collate(samples)
    alone = torch.cat(
        [
            model(side[0].view(1, -1), doc_lens=[len(side[0])]).scores
            for pair in samples
            for side in pair
        ]
    )
    return (model(X, doc_lens=doc_lens).scores - alone).abs().max().item()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, help="keep the reward model in this folder")
    parser.add_argument("--pairs", type=int, default=2400, help="to learn from")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch, out = Path(folder), args.out or Path(folder)
        run("dataset/make_demo.py", "--out_dir", scratch, "--pairs", args.pairs)
        flags = [
            *SHAPE,
            *RECIPE.split(),
            "--data_path",
            scratch / "preferences.jsonl",
            "--eval_data",
            PAIRS,
        ]
        flags += [
            "--out_dir",
            out,
            "--cache_dir",
            scratch / "cache",
            "--from_weight",
            args.weight.resolve(),
            *more,
        ]
        seconds = run("trainer/train_reward.py", *flags)
        result = metrics(out / "reward_192")[-1]
        difference = packed_and_alone(out / "reward_192.pth", scratch)
    accuracy = 100 * result["eval_accuracy"]
    print(f"\ntrained on {args.pairs:,} pairs in {seconds:.0f} s")
    print(f"held-out accuracy {accuracy:.1f} %, margin {result['eval_margin']:.2f}, "
          f"loss {result['eval_loss']:.4f}; scores in one row and alone differ by {difference:.1g}")  # fmt: skip
    return 0 if accuracy >= 95 else 1


if __name__ == "__main__":
    sys.exit(main())
