"""How much a step takes longer while a checkpoint is written beside it.

A step counts as one during a save when a half-written checkpoint lay in the run's folder while it
ran; what it takes to copy the tensors is in the time of the first of them, too. Times are seconds
per token, medians, of one run.

    python benchmarks/async_save.py --nproc 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def watch(process: subprocess.Popen, out: Path) -> set[int]:
    """Steps during which a checkpoint was being written."""
    during, step, writing = set(), 0, False
    while process.poll() is None:
        writing |= any(out.glob("full_sft_*/checkpoints/.tmp-*"))
        done = sum(path.read_bytes().count(b"\n") for path in out.glob("full_sft_*/metrics.jsonl"))
        if done > step:
            during |= set(range(step + 1, done + 1)) if writing else set()
            step, writing = done, False
        time.sleep(0.02)
    return during


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save_interval", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as out:
        command = [sys.executable]
        if args.nproc > 1:
            command += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={args.nproc}",
            ]
        command += [
            str(ROOT / "trainer/train_full_sft.py"),
            f"--out_dir={out}",
            f"--dim={args.dim}",
        ]
        command += [
            f"--max_steps={args.steps}",
            f"--save_interval={args.save_interval}",
            "--from_weight=none",
        ]
        command += [
            "--log_interval=1",
            "--batch_size=2",
            "--device=cpu",
            "--epochs=99",
            f"--cache_dir={out}/cache",
        ]
        command += ["--ddp", f"--strategy={args.strategy}"] if args.nproc > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1" if args.nproc > 1 else "2"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        saving = watch(process, Path(out))
        if process.returncode:
            return process.returncode
        lines = map(
            json.loads, next(Path(out).glob("full_sft_*/metrics.jsonl")).read_text().splitlines()
        )
        seconds = {
            line["step"]: 1 / line["tokens_per_sec"] for line in lines if line["step"] > 3
        }  # the first warm up
        size = sum(
            file.stat().st_size for file in next(Path(out).glob("*/checkpoints/step_*")).iterdir()
        )
    during = [seconds[step] for step in seconds if step in saving]
    without = [seconds[step] for step in seconds if step not in saving]
    ratio = statistics.median(during) / statistics.median(without)
    print(
        f"checkpoint of {size / 1e6:,.0f} MB, {len(during)} steps during a save, {len(without)}"
        " without"
    )
    print(
        f"seconds per token: {statistics.median(during):.2e} and {statistics.median(without):.2e},"
        f" ratio {ratio:.3f}"
    )
    return 1 if ratio > 1.1 else 0


if __name__ == "__main__":
    sys.exit(main())
