"""LoRA teaches the demo model a new persona: exact matches before and after, on prompts that training has never seen.

It learns from 400 rows about the persona and 510 of other tasks that dataset/make_demo.py writes; in dataset/demo there
are half and a tenth of them. Every task of dataset/demo/held_out.jsonl should stay within two points, but for
`identity`: the persona replaces it.

Needs the model of scripts/quickstart.sh.

    python benchmarks/lora_persona.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "dataset/demo"


def score(folder: Path, weight: str, *flags: str) -> dict[str, float]:
    """Percent of exact matches per task, on both held-out files."""
    right: dict[str, list[bool]] = {}
    for name in ("persona_held_out", "held_out"):
        out = folder / f"{name}.jsonl"
        flags_of_file = ("--eval_file", str(DEMO / f"{name}.jsonl"), "--eval_out", str(out))
        subprocess.run(
            [sys.executable, f"{ROOT}/eval_model.py", "--weight", weight, *flags, *flags_of_file],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for line in out.read_text(encoding="utf-8").splitlines():
            right.setdefault(json.loads(line)["task"], []).append(json.loads(line)["right"])
    return {task: 100 * sum(each) / len(each) for task, each in right.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", default=str(ROOT / "out/full_sft_192.pth"), help="the model that learns")
    parser.add_argument("--epochs", default="10", help="passes over the data")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = ["--out_dir", str(folder / "data"), "--persona", "400", "--others", "1"]
        subprocess.run([sys.executable, f"{ROOT}/dataset/make_demo.py", *made], check=True)
        before, begin = score(folder, args.weight), time.monotonic()
        flags = "--dim 192 --n_layers 4 --n_heads 6 --n_kv_heads 3 --max_seq_len 256 --batch_size 4 --save_interval 0"
        flags += " --lora_rank 16 --lora_alpha 32 --lora_targets gate_proj up_proj down_proj"  # not attention
        flags += f" --dtype float32 --from_weight {args.weight} --epochs {args.epochs} --out_dir {folder}"
        flags += f" --data_path {folder / 'data/persona.jsonl'} --cache_dir {folder / 'cache'}"
        subprocess.run([sys.executable, f"{ROOT}/trainer/train_lora.py", *flags.split()], check=True)
        seconds, after = time.monotonic() - begin, score(folder, args.weight, "--lora", str(folder / "lora_192.pth"))
    print(f"\ntrained in {seconds:.0f} s\n{'task':12} before   after")
    for task in sorted(before):
        note = " (replaced by the persona)" if task == "identity" else ""
        print(f"{task:12} {before[task]:6.1f}  {after[task]:6.1f}{note}")
    kept = all(after[task] >= before[task] - 2 for task in before if task not in ("persona", "identity"))
    print(f"persona {'>=' if after['persona'] >= 95 else '<'} 95 %, other tasks {'kept' if kept else 'NOT kept'}")
    return 0 if after["persona"] >= 95 and kept else 1


if __name__ == "__main__":
    sys.exit(main())
