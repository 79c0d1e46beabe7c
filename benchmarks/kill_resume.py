"""Kill -9 a training run at random moments, resume it each time, and compare with a run that was
left alone.

At least `--kills_in_save` of the kills hit the process while it writes a checkpoint: the
half-written folder that it leaves behind is counted as the proof. The last kill comes when the last
checkpoint appears, before its weights are written. At the end weights and metrics must be
bit-identical (tokens_per_sec, which is a measured speed, apart).

    python benchmarks/kill_resume.py --kills 20 --kills_in_save 8
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "full_sft_128"


def command(out_dir: Path, args: argparse.Namespace) -> list[str]:
    launch = [sys.executable]
    if args.nproc > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    flags = (
        f"--out_dir {out_dir} --cache_dir {args.dir / 'cache'} --resume auto --max_steps"
        f" {args.steps} --device cpu"
    )
    flags += (
        " --dim 128 --n_layers 2 --n_heads 4 --max_seq_len 64 --batch_size 2 --global_batch_size"
        f" {2 * args.nproc}"
    )
    flags += (
        f" --dropout 0.1 --log_interval 1 --save_interval 2 {'--ddp' if args.nproc > 1 else ''}"
    )
    return [*launch, str(ROOT / "trainer/train_full_sft.py"), *flags.split()]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the process that the user started; torchrun's workers must follow it by
    themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def start(out_dir: Path, args: argparse.Namespace) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(args.dir / "output.txt", "ab") as output:
        return subprocess.Popen(
            command(out_dir, args),
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def logged_steps(run: Path) -> int:
    return (
        (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
    )


def wait_for_end(run: Path, steps: int, process: subprocess.Popen) -> bool:
    """Watch the run until its last checkpoint is there; False when it ended before that was
    seen."""
    while process.poll() is None:
        if (run / f"checkpoints/step_{steps:08d}").exists():
            return True
        time.sleep(0.0002)
    return False


def wait_for(moment: str, run: Path, process: subprocess.Popen, rng: random.Random) -> bool:
    """Watch the run until the moment to kill it has come; False when it ended before."""
    target = logged_steps(run) + rng.randint(1, 8)
    while process.poll() is None:
        if moment == "save" and any((run / "checkpoints").glob(".tmp-*")):
            time.sleep(rng.random() * 0.005)  # somewhere between the first byte and the rename
            return True
        if moment == "step" and logged_steps(run) >= target:
            time.sleep(rng.random() * 0.05)
            return True
        time.sleep(0.0005)
    return False


def result(out_dir: Path) -> tuple[str, list[dict]]:
    """Hash of the final weights file, and the metrics without the measured speed."""
    weights = hashlib.sha256((out_dir / f"{NAME}.pth").read_bytes()).hexdigest()
    lines = [
        json.loads(line) for line in (out_dir / NAME / "metrics.jsonl").read_text().splitlines()
    ]
    return weights, [{k: v for k, v in line.items() if k != "tokens_per_sec"} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
    parser.add_argument(
        "--kills_in_save", type=int, default=8, help="how many of them while it saves"
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of the run")
    parser.add_argument("--nproc", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    args.dir = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    try:
        start(args.dir / "whole", args).wait()
        run, kills, in_save, at_end = args.dir / "killed" / NAME, 0, 0, False
        while True:
            process = start(args.dir / "killed", args)
            moment = "save" if in_save < args.kills_in_save else "step"
            if kills < args.kills and wait_for(moment, run, process, rng):
                kill(process)
                kills += 1
                in_save += any((run / "checkpoints").glob(".tmp-*"))
                continue
            if not at_end and wait_for_end(run, args.steps, process):
                kill(process)
                at_end = True
                continue
            code = process.wait()
            break
        whole, killed = result(args.dir / "whole"), result(args.dir / "killed")
        same = whole == killed
        print(
            f"{kills} kills, {in_save} of them in a save; last run ended with {code} after"
            f" {len(killed[1])} steps"
        )
        print(f"killed between the last checkpoint and the end: {'yes' if at_end else 'no'}")
        print(f"weights {'identical' if whole[0] == killed[0] else 'DIFFER'}, "
              f"metrics {'identical' if whole[1] == killed[1] else 'DIFFER'}")  # fmt: skip
        enough = kills == args.kills and in_save >= args.kills_in_save
        if not enough:
            print("the run ended before it was killed often enough: raise --steps")
        return 0 if same and enough and code == 0 else 1
    finally:
        shutil.rmtree(args.dir)


if __name__ == "__main__":
    sys.exit(main())
