"""Two processes with a thread each against one: supervised tokens per second of train_full_sft.py.

Each process has the default batch, 8 rows a step, so that two of them take 16.

What two processes could reach here is measured beside it: two runs that know nothing of each other.
Cores that share their execution units (hyperthreads) or their memory give less than twice the work,
whatever a program does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, figure

STEPS = 7


def run(folder: Path, data: str, processes: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "trainer/train_full_sft.py")]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "trainer/train_full_sft.py"),
            "--ddp",
            "--strategy=ddp",
        ]
    flags = (
        f"--data_path={data} --out_dir={folder} --cache_dir={folder.parent / 'cache'}"
        " --from_weight=none --dim=512"
    )
    flags += (
        f" --max_seq_len=768 --max_steps={STEPS} --device=cpu --log_interval=1 --save_interval=0"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *flags.split()], env=environment, stdout=subprocess.DEVNULL)


def rate(folder: Path) -> float:
    """Median supervised tokens per second, of the steps behind the first three."""
    lines = [
        json.loads(line) for line in next(folder.glob("*/metrics.jsonl")).read_text().splitlines()
    ]
    return statistics.median(
        line["tokens_per_sec"] * line["supervised_tokens"] / line["tokens"]
        for line in lines
        if line["step"] > 3
    )


def measure(args) -> list[dict]:
    ratios, limits = [], []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(args.rounds):
            folders = [Path(name) / f"{turn}_{what}" for what in ("one", "two", "left", "right")]
            for folder, processes in zip(folders[:2], (1, 2), strict=True):
                if run(folder, args.data_path[0], processes).wait():
                    raise SystemExit("a run failed")
            if any(
                [
                    process.wait()
                    for process in [run(folder, args.data_path[0], 1) for folder in folders[2:]]
                ]
            ):
                raise SystemExit("a run failed")
            one, two, left, right = map(rate, folders)
            ratios.append(two / one)
            limits.append((left + right) / one)
    value, limit = statistics.median(ratios), statistics.median(limits)
    detail = (
        f"two independent runs beside each other: {limit:.2f}; that is {value / limit:.0%} of it"
    )
    return [
        figure("2 processes x 1 thread / 1 process x 1 thread", value, least=1.9, detail=detail)
    ]
