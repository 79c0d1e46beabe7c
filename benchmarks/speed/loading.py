"""What the size of the data costs: the time of an epoch over ten times the rows, and the start with
a warm cache."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, figure

TINY = """--dim=64 --n_layers=1 --n_heads=2 --n_kv_heads=1 --max_seq_len=512 --device=cpu --from_weight=none
    --save_interval=0"""
START = """
import resource, sys, time
import torch, numpy
begin = time.perf_counter()
sys.path.insert(0, {root!r})
sys.argv = ["train_full_sft.py", *{flags!r}]
from trainer import train_full_sft
from runtime import tracking
log = tracking.Tracker.log
def first(self, metrics):
    log(self, metrics)
    print("SECONDS", time.perf_counter() - begin, flush=True)
tracking.Tracker.log = first
train_full_sft.main()
"""


def write(path: Path, rows: list[str], count: int) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            file.write(rows[n % len(rows)])
    return path


def train(folder: Path, data: Path, *more: str) -> tuple[float, float]:
    """Seconds of training per token, as the log has them behind the second step, and the peak of
    memory in MB."""
    flags = [
        *TINY.split(),
        f"--data_path={data}",
        f"--cache_dir={folder / 'cache'}",
        f"--out_dir={folder / data.stem}",
    ]
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0],"
        " run_name='__main__')"
    )
    script = (
        "import atexit, resource; atexit.register(lambda: print('PEAK',"
        " resource.getrusage(0).ru_maxrss));" + code
    )
    command = [sys.executable, "-c", script, str(ROOT / "trainer/train_full_sft.py"), *flags, *more]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    metrics = next((folder / data.stem).glob("*/metrics.jsonl")).read_text().splitlines()
    steps = [json.loads(line) for line in metrics][2:]
    seconds = sum(line["tokens"] / line["tokens_per_sec"] for line in steps)
    return seconds / sum(line["tokens"] for line in steps), int(out.split("PEAK")[1]) / 1024


def measure(args) -> list[dict]:
    rows = (ROOT / "dataset/demo/sft.jsonl").read_text("utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as name:
        folder, few = Path(name), args.few_rows
        small, large = (
            write(folder / "small.jsonl", rows, few),
            write(folder / "large.jsonl", rows, 10 * few),
        )
        flags = ("--log_interval=1", "--batch_size=8")
        (
            train(folder, small, *flags, "--max_steps=3"),
            train(folder, large, *flags, "--max_steps=3"),
        )  # caches
        times = [
            (train(folder, small, *flags), train(folder, large, *flags)) for _ in range(args.rounds)
        ]
        ratios = sorted(many[0] / one[0] for one, many in times)
        grown = max(many[1] - one[1] for one, many in times)
        lines = [figure("epoch over 10 x the rows: time / 10", ratios[len(ratios) // 2], most=1.03,
                        detail=f"{grown:+.0f} MB of memory")]  # fmt: skip
        million = write(folder / "million.jsonl", rows, args.start_rows)
        flags = [
            *TINY.split(),
            f"--data_path={million}",
            f"--cache_dir={folder / 'cache'}",
            "--max_steps=1",
        ]
        seconds = []
        for turn in range(args.rounds + 1):  # the first one makes the cache
            code = START.format(root=str(ROOT), flags=[*flags, f"--out_dir={folder / str(turn)}"])
            begin = time.perf_counter()
            out = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
            seconds.append(float(out.split("SECONDS")[1].split()[0]))
            whole = time.perf_counter() - begin
    detail = f"{whole:.1f} s with all imports"
    what = (
        f"start to first step, warm cache, {args.start_rows:,} rows: seconds besides the import of"
        " torch"
    )
    return [
        *lines,
        figure(what, sorted(seconds[1:])[len(seconds[1:]) // 2], most=2.0, detail=detail),
    ]
