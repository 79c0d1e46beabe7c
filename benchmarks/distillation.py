"""Distillation against plain SFT: the same small student, with the same data, seed, steps and
learning rates.

Both start from the same random weights and see the first rows of dataset/demo/sft.jsonl, few enough
that labels alone are soon learned by heart: there the teacher's distributions say more than the
labels. Scored is the mean loss per supervised token on dataset/demo/held_out.jsonl, which neither
the teacher nor a student has seen. Needs the model of scripts/quickstart.sh as the teacher.

    python benchmarks/distillation.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from demo_model import DEMO, TOKENIZER, arguments, run

from dataset.lm_dataset import SFTDataset, load_tokenizer
from model.weights import load_model

STUDENT = """--dim 128 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 256 --device cpu --save_interval 0
    --from_weight none --optimizer muon --learning_rate 3e-3 --batch_size 4 --epochs 99 --log_interval 50"""


@torch.no_grad()
def held_out_loss(weights: Path, dataset: SFTDataset) -> float:
    """Mean of -log p over the supervised tokens."""
    model, total = load_model(weights), 0.0
    for X, Y, mask in (dataset[row] for row in range(len(dataset))):
        at = mask.nonzero().squeeze(1)
        logits = model(X.unsqueeze(0), logits_at=at).logits
        total += torch.nn.functional.cross_entropy(logits, Y[at], reduction="sum").item()
    return total / int(dataset.supervised.sum())


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of either")
    parser.add_argument("--rows", type=int, default=2000, help="rows of dataset/demo/sft.jsonl")
    parser.add_argument("--kl", nargs="+", default=["forward"], help="divergences to try")
    parser.add_argument("--kl_weight", default="0.5", help="share of the divergence in the loss")
    parser.add_argument(
        "--kl_temperature", default="2.0", help="of both distributions in the divergence"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows = (DEMO / "sft.jsonl").read_text("utf-8").splitlines(keepends=True)[: args.rows]
        (scratch / "sft.jsonl").write_text("".join(rows), encoding="utf-8")
        rows = [
            json.loads(line) for line in (DEMO / "held_out.jsonl").read_text("utf-8").splitlines()
        ]
        rows = [
            [*row["conversations"], {"role": "assistant", "content": row["answer"]}] for row in rows
        ]
        path = scratch / "held_out.jsonl"
        path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
        tokenizer = load_tokenizer(TOKENIZER)
        held_out = SFTDataset(path, tokenizer, 256, cache_dir=scratch / "cache", loss_on="last")

        def student(script: str, *flags) -> tuple[float, float]:
            """Train one; its held-out loss, and the seconds."""
            out = scratch / script
            places = [
                "--data_path",
                scratch / "sft.jsonl",
                "--cache_dir",
                scratch / "cache",
                "--out_dir",
                out,
                "--tokenizer_dir",
                TOKENIZER,
            ]
            seconds = run(
                f"trainer/{script}.py", *STUDENT.split(), "--max_steps", args.steps, *places, *flags
            )
            return held_out_loss(next(out.glob("*.pth")), held_out), seconds

        plain, seconds = student("train_full_sft")
        lines = [f"teacher: held-out loss {held_out_loss(args.weight, held_out):.4f}"]
        lines.append(
            f"student by SFT, {args.steps} steps, {seconds:.0f} s: held-out loss {plain:.4f}"
        )
        better = True
        for kl in args.kl:
            how = (
                "--kl",
                kl,
                "--kl_weight",
                args.kl_weight,
                "--kl_temperature",
                args.kl_temperature,
            )
            loss, seconds = student(
                "train_distillation", "--teacher_weight", args.weight.resolve(), *how
            )
            lines.append(
                f"student by {' '.join(how)}, {args.steps} steps, {seconds:.0f} s: held-out loss"
                f" {loss:.4f}"
            )
            better = better and loss < plain
    print("\n" + "\n".join(lines))
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
