"""LoRA teaches the demo model a new persona: exact matches before and after, on prompts that
training has never seen.

It learns from 1,600 rows about the persona and 1,950 of other tasks that dataset/make_demo.py
writes; in dataset/demo there are an eighth and a thirtieth of them. Ends with exit code 0 if at
least 95 % of the persona's prompts are answered exactly and every task of
dataset/demo/held_out.jsonl stays within two points, but for `identity`: the persona replaces it.

    python benchmarks/lora_persona.py
    python benchmarks/lora_persona.py --epochs 5     # more flags go to trainer/train_lora.py
"""

import sys
import tempfile
from pathlib import Path

from demo_model import SHAPE, arguments, exact_match, run

RECIPE = """--batch_size 8 --epochs 6 --lora_rank 16 --lora_alpha 32 --lora_targets gate_proj up_proj down_proj
    --dtype float32"""  # not attention


def main() -> int:
    args, more = arguments(__doc__).parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)

        def score(*flags) -> dict[str, float]:
            files = (
                exact_match(scratch, name, "--weight", args.weight, *flags)
                for name in ("persona_held_out", "held_out")
            )
            return {task: percent for file in files for task, percent in file.items()}

        # Among rows of the other tasks, as many as only eleven times the demo's have.
        rows = ["--scale", 11, "--persona", 1600, "--others", 3]
        run("dataset/make_demo.py", "--out_dir", scratch / "data", *rows)
        before = score()
        flags = [*SHAPE, *RECIPE.split(), "--from_weight", args.weight.resolve()]
        flags += ["--data_path", scratch / "data/persona.jsonl"]
        flags += ["--cache_dir", scratch / "cache", "--out_dir", scratch, *more]
        seconds = run("trainer/train_lora.py", *flags)
        after = score("--lora", scratch / "lora_192.pth")
    print(f"\ntrained in {seconds:.0f} s\n{'task':12} before   after")
    for task in before:
        note = " (replaced by the persona)" if task == "identity" else ""
        print(f"{task:12} {before[task]:6.1f}  {after[task]:6.1f}{note}")
    kept = all(
        after[task] >= before[task] - 2 for task in before if task not in ("persona", "identity")
    )
    print(
        f"persona {'>=' if after['persona'] >= 95 else '<'} 95 %, other tasks"
        f" {'kept' if kept else 'NOT kept'}"
    )
    return 0 if after["persona"] >= 95 and kept else 1


if __name__ == "__main__":
    sys.exit(main())
