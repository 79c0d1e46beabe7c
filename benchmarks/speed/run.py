"""Speed, measured side by side: this project, its peers and the machine's limit, on the same work
in one run.

Prints a table of ratios, with the bound that each has to keep, and writes it as JSON. Each part
runs in a process of its own; variants take turns and medians count. The peers are in
requirements-bench.txt.

    python benchmarks/speed/run.py --data_path alpaca_en_demo.json alpaca_zh_demo.json
    python benchmarks/speed/run.py --only generation head_memory --rounds 5
    python benchmarks/speed/run.py --only training billion rollouts --device cuda --step_rows 256 --compile --large
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "training",
    "experts",
    "head_memory",
    "generation",
    "processes",
    "loading",
    "time_to_loss",
    "shares",
)
FOR_GPUS = ("rollouts", "billion")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PARTS + FOR_GPUS, default=PARTS, help="parts to run"
    )
    parser.add_argument(
        "--data_path", nargs="+", default=[str(ROOT / "dataset/demo/sft.jsonl")], help="SFT data"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each variant takes")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn")
    parser.add_argument(
        "--step_rows", type=int, default=16, help="training, experts: rows of a step"
    )
    parser.add_argument(
        "--large", action="store_true", help="training: also 768 x 8, vocabulary of 32k; GPU: 104 M"
    )
    parser.add_argument(
        "--compile", action="store_true", help="training, shares: also with torch.compile"
    )
    parser.add_argument(
        "--start_rows", type=int, default=1_000_000, help="loading: rows of the start"
    )
    parser.add_argument(
        "--few_rows", type=int, default=1000, help="loading: rows of the short epoch"
    )
    parser.add_argument(
        "--loss_rows", type=int, default=800, help="time_to_loss: rows of the epoch"
    )
    tries = [16, 17, 18, 20, 24, 30, 40, 60, 80, 120]
    parser.add_argument(
        "--loss_steps", type=int, nargs="+", default=tries, help="time_to_loss: steps of our runs"
    )
    parser.add_argument("--json", type=Path, help="file for the table")
    args = parser.parse_args()
    if "billion" in args.only and args.device == "cpu":
        parser.exit(2, "error: --only billion: a step takes a CPU an hour; add --device cuda\n")
    if args.step_rows < 4:
        parser.exit(
            2,
            f"error: --step_rows {args.step_rows}: must be 4 or more, a padded micro-batch has a"
            " quarter\n",
        )
    if args.device == "cuda" and not cuda_works():
        parser.exit(2, "error: --device cuda: torch sees no GPU\n")
    return args


def cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()


def machine(device: str) -> str:
    import torch

    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), ""
    )
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{model or platform.machine()}, {os.cpu_count()} CPUs"
    )
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({flags}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> int:
    args = parse_args()
    args.data_path = [str(Path(path).resolve()) for path in args.data_path]
    if len(args.only) == 1 and "SPEED_PART" in os.environ:
        lines = importlib.import_module(args.only[0]).measure(args)
        Path(os.environ["SPEED_PART"]).write_text(json.dumps(lines))
        return 0
    table, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            print(f"== {part}", flush=True)
            out = Path(folder) / f"{part}.json"
            # The last --only wins.
            command = [sys.executable, __file__, *sys.argv[1:], "--only", part]
            if subprocess.run(command, env={**os.environ, "SPEED_PART": str(out)}).returncode:
                failed.append(part)
            else:
                table += json.loads(out.read_text())
    print(f"\n{machine(args.device)}")
    for line in table:
        bound = (
            f">= {line['least']:g}"
            if line["least"]
            else f"<= {line['most']:g}"
            if line["most"]
            else ""
        )
        verdict = "" if not bound else "kept" if line["kept"] else "MISSED"
        what = "; ".join(part for part in (line["what"], line["detail"]) if part)
        print(f"{line['value']:8.3f}  {bound:8} {verdict:7} {what}")
    for part in failed:
        print(f"{part} failed")
    if args.json:
        result = {
            "machine": machine(args.device),
            "command": " ".join(["python", *sys.argv]),
            "table": table,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
