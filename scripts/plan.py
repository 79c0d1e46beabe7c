"""Plan a run before it costs anything: memory, batch, steps, strategy, scaling to 1,024 devices.

    python scripts/plan.py --config configs/sft.yaml --devices 8 --gpu a100
    python scripts/plan.py --stage pretrain --dim 4096 --n_layers 32 --data_path none --gpu h100 --devices 64 --nodes 8
    torchrun --nproc_per_node 2 scripts/plan.py --measure

Takes all flags of the stage's training script. Every figure is computed from the model's shape and
the machine's, and every assumption is printed; --measure replaces those about this machine's
compute and link by measured ones.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from runtime.launcher import die_with_launcher, read_launch

die_with_launcher()  # before the imports, which take seconds

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dataset.cached_dataset import describe
from dataset.packing import plan_epoch, split_rows
from model.lm import LMConfig, MiniMindLM
from runtime import launch
from runtime.distributed import link, memory
from runtime.distributed.scaling import Load, Machine, flops_per_token, step_cost
from runtime.distributed.tensor_parallel import check_sizes
from runtime.process.exits import end_with_reader
from scripts.preflight import stage_flags
from scripts.prepare_data import STAGES, open_data, open_stage

# From the vendors' data sheets: memory in GiB, dense bfloat16 TFLOPS, GB/s one way between the
# devices of a machine (NVLink or PCIe), and Gbit/s of the network of a usual machine of 8.
GPUS = {
    "b200": (180, 2250, 900, 3200),
    "h200": (141, 989, 450, 3200),
    "h100": (80, 989, 450, 3200),
    "a100": (80, 312, 300, 1600),
    "l40s": (48, 362, 32, 400),
    "v100": (32, 125, 150, 100),
    "4090": (24, 165, 32, 100),
}
LARGEST = 1024  # devices in the scaling table
PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers", "total")


# --------------------------------------------------------------------------------------------------
# Measured figures
# --------------------------------------------------------------------------------------------------


def measure_step(
    config: LMConfig, args, load: Load, device: torch.device, repeats: int = 3
) -> float:
    """Tokens per second of forward and backward of this model on this device; a median."""
    model = MiniMindLM(config, args.gradient_checkpointing).to(device)
    length = min(round(load.row_tokens), config.max_seq_len)
    ids = torch.randint(config.vocab_size, (1, length * args.batch_size), device=device)
    at = torch.arange(max(1, round(ids.numel() * load.supervised)), device=device)
    low = None if args.dtype == "float32" else getattr(torch, args.dtype)
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        with torch.autocast(device.type, low) if low else nullcontext():
            out = model(ids, doc_lens=[length] * args.batch_size, logits_at=at)
            loss = F.cross_entropy(out.logits.float(), ids[0, at]) + out.aux_loss
        loss.backward()
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return ids.numel() / statistics.median(seconds[1:])


def measure(machine: Machine, config: LMConfig, load: Load, args, cuda: bool) -> list[str]:
    """Replace the figures of `machine` by this machine's; returns a line about each.

    Raises:
        ValueError: the model does not fit.
    """
    launched = read_launch()
    device = torch.device("cuda", launched.local_rank) if cuda else torch.device("cpu")
    if launched.launched:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    machine.memory = memory.device_memory(device) or machine.memory
    need = memory.estimate(config, "ddp", data_ranks=1, tokens=args.batch_size * load.longest,
                           supervised=args.batch_size * load.longest, dtype=args.dtype)["total"]  # fmt: skip
    if need > machine.memory:
        sizes = f"needs {need / memory.GIB:.3g} GiB, free are {machine.memory / memory.GIB:.3g} GiB"
        raise ValueError(
            f"--measure: a step {sizes}: measure a smaller --batch_size, or on a larger device"
        )
    machine.tokens_per_sec = measure_step(config, args, load, device)
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"a device ({name}) computes {machine.tokens_per_sec:,.0f} tokens/s, measured with {ranks}"
        " processes"
    ]
    if ranks == 1:
        return [
            *lines,
            (
                f"a device sends {machine.inside / 1e9:,.3g} GB/s inside a machine: not measured,"
                " use torchrun"
            ),
        ]
    link_speed = link.measure(device)
    machine.inside, machine.latency = link_speed["bandwidth"], link_speed["latency"]
    machine.between = min(machine.between, machine.inside)
    return [
        *lines,
        f"a device sends {machine.inside / 1e9:,.3g} GB/s, measured between {ranks} processes",
    ]


# --------------------------------------------------------------------------------------------------
# Reading and printing
# --------------------------------------------------------------------------------------------------


def read_load(stage: str, args, tokenizer) -> tuple[Load, str]:
    """Means of the stage's data as the first epoch would lay it out, and a line about it."""
    if args.data_path == "none":
        return (
            Load(args.max_seq_len, args.max_seq_len, args.max_seq_len, 1.0, None),
            "none: every row is full",
        )
    dataset = open_data(stage, args, tokenizer)
    train_rows, _ = split_rows(len(dataset), args.eval_ratio, args.seed)
    plan = plan_epoch(dataset, train_rows, args.seed, args.max_seq_len, args.packing, 1, 0, 0)
    tokens, supervised = plan.tokens[-1], plan.supervised[-1]
    longest = int(np.diff(plan.tokens[plan.starts]).max())
    load = Load(
        tokens / plan.rows, longest, tokens / len(train_rows), supervised / tokens, plan.rows
    )
    return load, f"{args.data_path}: {describe(dataset)}"


def table(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Columns aligned, numbers to the right; as Markdown with --markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        for row in [header, *rows]
    ]
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plural(count: float, noun: str) -> str:
    return f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}" if count != 1 else f"1 {noun}"


def parse_args() -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of this script, and those of the stage."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.error = launch.usage_error
    parser.add_argument(
        "--stage",
        choices=STAGES,
        default="sft",
        help="whose flags and data (--data_path none: none)",
    )
    parser.add_argument("--devices", type=int, default=8, help="devices of the run")
    parser.add_argument("--nodes", type=int, default=1, help="machines that they are in")
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        default="h100",
        help="whose figures count, where none are given below",
    )
    parser.add_argument("--device_memory_gb", type=float, help="memory of a device in GiB")
    parser.add_argument("--flops_tflops", type=float, help="peak of a device in TFLOPS")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that training reaches"
    )
    parser.add_argument("--link_gbps", type=float, help="network of a machine in Gbit/s")
    parser.add_argument(
        "--latency_us", type=float, default=10.0, help="of a message between two devices"
    )
    parser.add_argument(
        "--overlap", type=float, default=1.0, help="share of backward that hides communication"
    )
    parser.add_argument("--vocab_size", type=int, help="instead of the tokenizer's")
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine, and under torchrun the link"
    )
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    own, rest = parser.parse_known_args()
    launch.check_flags(vars(own))
    args = stage_flags(Path(f"trainer/{STAGES[own.stage][0]}.py"), rest)
    sharers = args.tensor_parallel * args.context_parallel
    for count, name in (
        (own.nodes, "--nodes"),
        (sharers, "--tensor_parallel x --context_parallel"),
    ):
        if own.devices % count:
            raise ValueError(f"--devices {own.devices} is not a multiple of {name} {count}")
    if args.strategy == "dp" or (args.strategy == "zero1" and args.tensor_parallel > 1):
        raise ValueError(
            f"--strategy {args.strategy}: plan ddp, zero1 (without --tensor_parallel), zero2 or"
            " zero3"
        )
    if args.offload and args.strategy not in ("zero2", "zero3"):
        raise ValueError(f"--offload 1 needs --strategy zero2 or zero3, it is {args.strategy}")
    return own, args


def main() -> int:
    # 1. Flags, model, data
    own, args = parse_args()
    end_with_reader()
    start = open_stage(own.stage, args)
    shape, vocab_size = start.shape, own.vocab_size
    config = dataclasses.replace(shape, vocab_size=vocab_size) if vocab_size else start.config
    check_sizes(config, args.tensor_parallel)
    load, described = read_load(own.stage, args, start.tokenizer)

    # 2. The machine: as asked for, or as it is
    machine, assumptions = read_machine(own, args, config, load)
    if dist.is_initialized() and dist.get_rank() > 0:
        return 0

    # 3. The run on --devices, 4. on any number, 5. what all this rests on
    print_run(own, args, config, machine, load, described)
    print_scaling(own, args, config, machine, load)
    hidden = "the last backward pass (zero2, zero3: of the whole step)"
    assumptions += [
        f"a machine sends {machine.between * 8 / 1e9:,.4g} Gbit/s to the others",
        f"a message takes {1e6 * machine.latency:,.0f} us x log2(ranks) beside its bytes",
        f"messages but the last travel beside {machine.overlap:.0%} of {hidden}",
        f"gradients travel as float32, gathered weights as {args.dtype}",
        (
            f"a row has {load.row_tokens:,.0f} tokens, the longest {load.longest:,};"
            f" {load.supervised:.0%} carry loss"
        ),
        "no stragglers, no waiting for data, no time for the optimizer",
    ]
    print("\nAssumptions\n\n" + "\n".join(f"- {line}" for line in assumptions))
    return 0


def read_machine(own, args, config: LMConfig, load: Load) -> tuple[Machine, list[str]]:
    """The machine that is asked for, or this one with --measure, and what is assumed of it.

    Args:
        own: the flags of this script.
        args: those of the stage; dtype is set.
    """
    gpu_memory, tflops, inside, network = GPUS[own.gpu]
    size, tflops = own.device_memory_gb or gpu_memory, own.flops_tflops or tflops
    cuda = own.measure and torch.cuda.is_available() and args.device != "cpu"
    args.dtype = args.dtype or ("float32" if own.measure and not cuda else "bfloat16")
    flops = flops_per_token(config, load, args.gradient_checkpointing)
    machine = Machine(
        memory=size * memory.GIB,
        per_node=own.devices // own.nodes,
        inside=inside * 1e9,
        between=(own.link_gbps or network) * 1e9 / 8,
        latency=own.latency_us / 1e6,
        tokens_per_sec=tflops * 1e12 * own.mfu / flops,
        overlap=own.overlap,
    )
    if own.nodes == 1:
        machine.per_node = max(8, own.devices)
    if own.measure:
        return machine, measure(machine, config, load, args, cuda)
    return machine, [
        f"a device computes {tflops:,.0f} TFLOPS (16-bit; give --flops_tflops for float32) x MFU"
        f" {own.mfu}",
        f"a device sends {inside} GB/s inside a machine of {machine.per_node}",
    ]


def print_run(own, args, config: LMConfig, machine: Machine, load: Load, described: str) -> None:
    """The run on --devices: batch, length, and memory under each strategy."""
    row = step_cost(config, machine, load, args, own.devices)
    sharers = args.tensor_parallel * args.context_parallel
    step_tokens = row["rows"] * load.row_tokens
    model = f"dim {config.dim} x {config.n_layers} layers, vocabulary {config.vocab_size:,}"
    devices, machines = plural(own.devices, "device"), plural(own.nodes, "machine")
    print(
        f"model     {model}: {memory.parameter_count(config):,} parameters, {args.dtype},"
        f" {args.optimizer}"
    )
    print(f"machine   {devices} of {machine.memory / memory.GIB:,.3g} GiB in {machines}")
    print(f"data      {described}")
    factors = (
        (args.batch_size, "row"),
        (row["micro"], "micro-batch"),
        (own.devices // sharers, "data rank"),
    )
    batch = " x ".join(plural(*factor) for factor in factors)
    print(
        f"batch     {plural(row['rows'], 'row')}, about {step_tokens:,.0f} tokens per step: {batch}"
    )
    if load.rows is not None:
        steps = load.rows // row["rows"] if args.drop_last else -(-load.rows // row["rows"])
        total = min(args.max_steps or math.inf, steps * args.epochs)
        seconds = total * step_tokens / row["tokens_per_sec"]
        length = f"{seconds:,.3g} seconds" if seconds < 3600 else f"{seconds / 3600:,.1f} hours"
        epoch = (
            f"{load.rows:,} rows, {load.rows * load.row_tokens:,.0f} tokens,"
            f" {plural(steps, 'step')}"
        )
        print(f"run       an epoch: {epoch}; all: {plural(total, 'step')}, {length}")
    print(f"strategy  {row['reason']}\n\nMemory per device at {devices}, GiB\n")
    room, lines = memory.SAFE_SHARE * machine.memory, []
    for strategy, need in row["needs"].items():
        sizes = (f"{need[part] / memory.GIB:,.2f}" for part in PARTS)
        lines.append([strategy, *sizes, "yes" if need["total"] <= room else "no"])
    print(table(["strategy", *PARTS, "fits"], lines, own.markdown))


def print_scaling(own, args, config: LMConfig, machine: Machine, load: Load) -> None:
    """From one device, or one group that shares rows and layers, to LARGEST."""
    sharers = args.tensor_parallel * args.context_parallel
    counts = {sharers * 2**n for n in range(11) if sharers * 2**n <= LARGEST}
    room, lines = memory.SAFE_SHARE * machine.memory, []
    for row in (step_cost(config, machine, load, args, n) for n in sorted(counts | {own.devices})):
        lines.append([
            f"{row['devices']:,}",
            row["strategy"],
            f"{row['memory'] / memory.GIB:,.2f}{'' if row['memory'] <= room else '!'}",
            f"{row['rows']:,}",
            f"{row['sent'] / 1e9:,.3f}",
            f"{1e3 * row['compute']:,.1f}",
            f"{1e3 * row['waiting']:,.1f}",
            f"{row['efficiency']:.1%}",
            f"{row['tokens_per_sec']:,.0f}",
        ])  # fmt: skip
    print("\nScaling; per device and step, ! does not fit\n")
    header = "devices,strategy,GiB,rows of all,GB sent,compute ms,waiting ms,efficiency"
    print(table([*header.split(","), "tokens/s of all"], lines, own.markdown))


if __name__ == "__main__":
    launch.run(main)
