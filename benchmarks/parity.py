"""One curve: train the same run in every layout there is, and compare losses and weights with one
process.

Same data (short and long answers mixed, so that masks are unequal), seed and global batch
everywhere; float32; packed. Engines that are not installed are named and left out.

    python benchmarks/parity.py
    python benchmarks/parity.py --only zero3 "deepspeed 3" --models moe --steps 5
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
GLOBAL_BATCH = 12
LOSS, WEIGHTS = 1e-5, 1e-4  # largest relative difference that counts as equal
KERNELS = 1e-4  # of the loss, where DeepSpeed's optimizer kernels for the CPU take the steps

# name: (processes, script, flags, largest difference of the loss). 12 rows = processes x
# micro-batches x batch_size.
FULL, DEEPSPEED, PIPELINE = "train_full_sft", "train_sft_deepspeed", "train_sft_pipeline"
LAYOUTS = {
    "one process": (1, FULL, "--batch_size 12", LOSS),
    "accumulation 2": (1, FULL, "--batch_size 6 --accumulation_steps 2", LOSS),
    "accumulation 4": (1, FULL, "--batch_size 3 --accumulation_steps 4", LOSS),
    "ddp x2": (2, FULL, "--strategy ddp --batch_size 6", LOSS),
    "ddp x2, accumulation 2": (
        2,
        FULL,
        "--strategy ddp --batch_size 3 --accumulation_steps 2",
        LOSS,
    ),
    "ddp x3": (3, FULL, "--strategy ddp --batch_size 4", LOSS),
    "ddp x4": (4, FULL, "--strategy ddp --batch_size 3", LOSS),
    "zero1 x2": (2, FULL, "--strategy zero1 --batch_size 6", LOSS),
    "zero2 x2": (2, FULL, "--strategy zero2 --batch_size 6", LOSS),
    "zero3 x2": (2, FULL, "--strategy zero3 --batch_size 3 --accumulation_steps 2", LOSS),
    "zero3 + offload x2": (2, FULL, "--strategy zero3 --offload 1 --batch_size 6", LOSS),
    "tensor x2": (2, FULL, "--tensor_parallel 2 --batch_size 6 --accumulation_steps 2", LOSS),
    "context x2": (2, FULL, "--context_parallel 2 --batch_size 6 --accumulation_steps 2", LOSS),
    "tensor x2, zero3 x2": (4, FULL, "--tensor_parallel 2 --strategy zero3 --batch_size 6", LOSS),
    "pipeline x2, gpipe": (
        2,
        PIPELINE,
        "--pipeline_schedule gpipe --batch_size 3 --accumulation_steps 4",
        LOSS,
    ),
    "pipeline x2, 1f1b": (
        2,
        PIPELINE,
        "--pipeline_schedule 1f1b --batch_size 3 --accumulation_steps 4",
        LOSS,
    ),
    "pipeline x2, interleaved": (
        2,
        PIPELINE,
        "--pipeline_schedule interleaved --batch_size 3 --accumulation_steps 4",
        LOSS,
    ),
    "pipeline x2, data x2": (4, PIPELINE, "--batch_size 3 --accumulation_steps 2", LOSS),
    "pipeline x2, tensor x2": (
        4,
        PIPELINE,
        "--tensor_parallel 2 --batch_size 3 --accumulation_steps 4",
        LOSS,
    ),
    "deepspeed 0": (2, DEEPSPEED, "--deepspeed_config {json}/zero0.json --batch_size 6", LOSS),
    "deepspeed 1": (2, DEEPSPEED, "--deepspeed_config {json}/zero1.json --batch_size 6", LOSS),
    "deepspeed 2": (2, DEEPSPEED, "--deepspeed_config {json}/zero2.json --batch_size 6", LOSS),
    "deepspeed 3": (2, DEEPSPEED, "--deepspeed_config {json}/zero3.json --batch_size 6", LOSS),
    "deepspeed 3 + CPU": (
        2,
        DEEPSPEED,
        "--deepspeed_config {json}/zero3_offload.json --batch_size 6",
        KERNELS,
    ),
    "deepspeed 3 + NVMe": (
        2,
        DEEPSPEED,
        "--deepspeed_config {json}/zero3_nvme.json --batch_size 6",
        KERNELS,
    ),
    "accelerate ddp x2": (2, "train_sft_accelerate", "--batch_size 3 --accumulation_steps 2", LOSS),
    "lightning ddp x2": (2, "train_sft_lightning", "--batch_size 3 --accumulation_steps 2", LOSS),
    "lightning model parallel x2": (
        2,
        "train_sft_lightning",
        "--strategy model_parallel --batch_size 6",
        LOSS,
    ),
}
NEEDS = {
    DEEPSPEED: "deepspeed",
    "train_sft_accelerate": "accelerate",
    "train_sft_lightning": "lightning",
}


def missing(name: str) -> str:
    """What a layout would need and is not installed here."""
    package = NEEDS.get(LAYOUTS[name][1])
    if package and find_spec(package) is None:
        return f"pip install {package}"
    if "NVMe" in name:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else it says so, in the middle of the table
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return "" if AsyncIOBuilder().is_compatible(verbose=False) else "apt install libaio-dev"
    return ""


def write_data(path: Path) -> None:
    """400 conversations whose questions and answers have from a few to a hundred words each."""
    words = "a the cat dog house tree river sings runs sleeps under over small large green quick".split()
    with open(path, "w") as file:
        for n in range(400):
            question = " ".join(words[(n * 7 + k * k) % 16] for k in range(3 + n * 13 % 60))
            answer = " ".join(words[(n * 5 + k * 3) % 16] for k in range(1 + n * n % 97))
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"conversations": turns}) + "\n")


def train(name: str, moe: bool, folder: Path, args) -> tuple[list[float], dict]:
    """Losses and final weights of the run in one layout."""
    processes, script, flags, _ = LAYOUTS[name]
    out = folder / f"{name.replace(' ', '_')}_{'moe' if moe else 'dense'}"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [
        str(ROOT / f"trainer/{script}.py"),
        *flags.format(json=ROOT / "configs/deepspeed").split(),
    ]
    command += ["--ddp"] if processes > 1 else []
    command += (
        f"--use_moe {int(moe)} --max_steps {args.steps} --global_batch_size {GLOBAL_BATCH}"
        " --packing 1".split()
    )
    command += "--dim 64 --n_layers 4 --n_heads 4 --n_kv_heads 2 --max_seq_len 128 --learning_rate 1e-3".split()
    command += (
        "--from_weight none --device cpu --dtype float32 --log_interval 1 --save_interval 0".split()
    )
    command += f"--data_path {folder / 'data.jsonl'} --cache_dir {folder / 'cache'} --out_dir {out}".split()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    weights = next(out.glob("*.pth"), None)
    if weights is None or done.returncode:
        raise SystemExit(
            f"{name} ended with {done.returncode}: {' '.join(command)}\n{done.stdout}{done.stderr}"
        )
    lines = map(json.loads, (weights.with_suffix("") / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line], torch.load(
        weights, weights_only=True
    )


def compare(ours: tuple, reference: tuple) -> tuple[float, float]:
    """Largest relative difference of a loss, and of a tensor's norm."""
    assert len(ours[0]) == len(reference[0]) and ours[1].keys() == reference[1].keys()
    loss = max(abs(a - b) / b for a, b in zip(ours[0], reference[0], strict=True))
    weights = max(
        ((ours[1][name] - value).norm() / value.norm()).item()
        for name, value in reference[1].items()
    )
    return loss, weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of every run")
    parser.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    parser.add_argument(
        "--only", nargs="+", choices=list(LAYOUTS), metavar="LAYOUT", help="some of the layouts"
    )
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder / "data.jsonl")
        print(
            f"{args.steps} steps of {GLOBAL_BATCH} packs, float32: largest relative difference to"
            " one process"
        )
        print(
            "layout".ljust(30)
            + "".join(f"{model + ' loss':>14}{'weights':>10}" for model in args.models)
        )
        references = {
            model: train("one process", model == "moe", folder, args) for model in args.models
        }
        for name, (_, _, _, limit) in LAYOUTS.items():
            if args.only and name not in args.only or name == "one process":
                continue
            if absent := missing(name):
                print(f"{name:<30}  left out: {absent}", flush=True)
                continue
            began, row, good = time.monotonic(), name.ljust(30), True
            for model in args.models:
                loss, weights = compare(
                    train(name, model == "moe", folder, args), references[model]
                )
                row += f"{loss:>14.1e}{weights:>10.1e}"
                good &= loss <= limit and weights <= WEIGHTS
            print(
                f"{row}  {'ok' if good else 'DIFFERS'}  {time.monotonic() - began:4.0f} s",
                flush=True,
            )
            failed += [] if good else [name]
    limits = (
        f"loss {LOSS:.0e} (DeepSpeed's own optimizer kernels: {KERNELS:.0e}), weights {WEIGHTS:.0e}"
    )
    print(f"differing by more than {limits}: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
