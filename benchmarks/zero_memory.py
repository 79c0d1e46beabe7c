"""Bytes per process that each strategy holds, measured on the tensors of a real step, against the
formulas of ZeRO.

Psi parameters, N processes, AdamW, float32: parameters 4 Psi, gradients 4 Psi, optimizer 8 Psi,
each divided by N where the strategy shards it. With zero2 every process computes with whole weights
(4 Psi, between forward and backward) and owns a shard of them besides, which is counted with the
optimizer, as the paper counts its float32 master weights.
Source: Rajbhandari et al., ZeRO (2020), section 3.1 and figure 1, with K = 8 for AdamW without a
    master copy.

    python benchmarks/zero_memory.py --processes 4
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.lm import LMConfig, MiniMindLM
from runtime import parallel
from runtime.distributed import mesh
from runtime.launcher import read_launch
from runtime.optim import make_optimizer
from runtime.saving import resume

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
TOLERANCE = 0.1


def size(tensors) -> int:
    """Bytes that this process holds of some tensors."""
    return sum(parallel.local(t).numel() * t.element_size() for t in tensors)


def formula(strategy: str, psi: int, n: int) -> dict[str, float]:
    return {
        "parameters": 4 * psi / (n if strategy == "zero3" else 1),
        "gradients": 4 * psi / (n if strategy in ("zero2", "zero3") else 1),
        "optimizer": (
            (8 * psi + (4 * psi if strategy == "zero2" else 0)) / (1 if strategy == "ddp" else n)
        ),
    }


def measure(args: argparse.Namespace) -> dict[str, int]:
    """What this rank holds: parameters between forward and backward, gradients behind it, optimizer
    behind a step."""
    flags = {
        "device": torch.device("cpu"),
        "strategy": args.strategy,
        "batch_size": 1,
        "compile": 0,
        "offload": 0,
    }
    mesh.make_mesh(flags["device"], args.strategy, context=1, tensor=1)
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(dim=args.dim, n_layers=args.n_layers, n_heads=8, n_kv_heads=2))
    model = parallel.wrap(
        model, SimpleNamespace(**flags, bucket_cap_mb=25), "float32", dist.get_world_size()
    )
    optimizer = make_optimizer(model, "adamw", 1e-3, 0.1, args.strategy == "zero1")
    ids = torch.arange(64).unsqueeze(0)
    for _ in range(2):  # the second step has everything that the first one made
        loss = model(ids, doc_lens=[64], logits_at=torch.arange(64)).logits.square().mean()
        found = {"parameters": size(parallel.unwrap(model).parameters())}
        loss.backward()
        found["gradients"] = size(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    states = resume.states_of(model, optimizer).values()
    found["optimizer"] = size(value for _, state, _ in states for value in state.values())
    if args.strategy == "zero2":
        found["optimizer"] += size(
            model.parameters()
        )  # the shard that it owns, in view now that the step is over
    return found


def worker(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    everyone = parallel.gather_objects(measure(args))
    if dist.get_rank() == 0:
        print("found", *(max(found[part] for found in everyone) for part in everyone[0]))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--n_layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--strategy", choices=STRATEGIES, help="(of a worker)")
    args = parser.parse_args()
    if read_launch().launched:
        worker(args)
        return 0
    with torch.device("meta"):
        model = MiniMindLM(LMConfig(dim=args.dim, n_layers=args.n_layers, n_heads=8, n_kv_heads=2))
    psi, n, worst = sum(p.numel() for p in model.parameters()), args.processes, 0.0
    print(
        f"dim {args.dim} x {args.n_layers} layers: {psi:,} parameters, {n} processes; MB of the"
        " fullest (formula)"
    )
    print(
        "strategy"
        + "".join(f"{part:>20}" for part in ("parameters", "gradients", "optimizer", "together"))
    )
    for strategy in STRATEGIES:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
            __file__,
        ]
        command += [f"--dim={args.dim}", f"--n_layers={args.n_layers}", f"--strategy={strategy}"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("found ")), None)
        if line is None:
            raise SystemExit(done.stderr)
        measured, expected = (
            [int(word) for word in line.split()[1:]],
            [*formula(strategy, psi, n).values()],
        )
        pairs = [*zip(measured, expected, strict=True), (sum(measured), sum(expected))]
        cells = (f"{found / 1e6:,.0f} ({wanted / 1e6:,.0f})" for found, wanted in pairs)
        print(f"{strategy:<8}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
        worst = max(worst, *(abs(found / wanted - 1) for found, wanted in pairs))
    print(f"largest distance to the formula: {worst:.1%}")
    return 1 if worst > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
