"""What the benchmarks of the stages behind SFT share: the model of scripts/quickstart.sh and its
held-out prompts."""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "dataset/demo"
TOKENIZER = DEMO / "tokenizer"  # with which that model was trained
SHAPE = (
    "--dim 192 --n_layers 6 --n_heads 3 --n_kv_heads 3 --max_seq_len 256 --device cpu"
    " --save_interval 0".split()
)


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser for a benchmark, with the model that it starts from."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--weight", type=Path, default=ROOT / "out/full_sft_192.pth", help="the model to start from"
    )
    return parser


def run(script: str, *flags) -> float:
    """Run a script of the project, and show what it prints; its seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True)
    return time.monotonic() - began


def exact_match(scratch: Path, name: str, *flags) -> dict[str, float]:
    """Percent of the prompts in dataset/demo/NAME.jsonl that a model answers exactly and greedily,
    for each task.

    Args:
        scratch: a folder for the answers.
        flags: of eval_model.py, which say what model.
    """
    out = scratch / f"{name}_answers.jsonl"
    run("eval_model.py", *flags, "--eval_file", DEMO / f"{name}.jsonl", "--eval_out", out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    asked, right = (
        Counter(row["task"] for row in rows if row["right"] >= least) for least in (False, True)
    )
    return {task: 100 * right[task] / asked[task] for task in sorted(asked)}


def metrics(run_folder: Path) -> list[dict]:
    """What a run has written about its steps."""
    return [
        json.loads(line)
        for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
