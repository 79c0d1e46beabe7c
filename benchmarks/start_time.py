"""How long a run takes from its imports to its first step, behind what torch takes to be imported.

    python benchmarks/start_time.py FOLDER [flags of train_full_sft.py]

FOLDER is in Hugging Face's format, or a .pth file. The first start makes the token cache; the
fastest of three warm ones counts.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = f"""
import sys, time
import numpy, torch, torch.distributed
begin = time.perf_counter()
sys.path.insert(0, {str(ROOT)!r})
from trainer import train_full_sft
def first_step(*_):
    print("seconds:", time.perf_counter() - begin)
    raise SystemExit
train_full_sft.train_epoch = first_step
train_full_sft.main()
"""


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", CODE, f"--from_weight={sys.argv[1]}", *sys.argv[2:]]
        command += ["--max_steps=1", f"--out_dir={scratch}/out", f"--cache_dir={scratch}/cache"]
        seconds = []
        for _ in range(4):
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                sys.exit(ended.stderr)
            seconds.append(float(ended.stdout.rpartition("seconds:")[2]))
    print(f"the first start {seconds[0]:.2f} s; warm {min(seconds[1:]):.2f} s")


if __name__ == "__main__":
    main()
