"""What a step costs on any number of devices: compute, bytes sent, time that is spent waiting.

A model on paper, which `scripts/plan.py` prints. It knows nothing of stragglers, data loading and the optimizer's own
time.
"""

import math
from dataclasses import dataclass

import torch

from model.lm import LMConfig
from runtime.distributed import memory


@dataclass
class Machine:
    memory: float  # bytes per device
    per_node: int  # devices of one machine
    inside: float  # bytes/s of a device to its neighbours in the machine
    between: float  # bytes/s of a machine to the others
    latency: float  # seconds of a message
    tokens_per_sec: float  # of one device, forward and backward
    overlap: float = 1.0  # share of the compute beside messages that really hides them


@dataclass
class Load:
    """What is trained on: means over the epoch, except for `longest`."""

    row_tokens: float
    longest: int  # tokens of the longest row
    document: float  # tokens of a document
    supervised: float  # share of the tokens
    rows: int | None  # of an epoch; None: no data


def flops_per_token(config: LMConfig, load: Load, checkpointing: int) -> float:
    """Floating point operations of forward and backward, per token.

    Two per weight and token forward, twice that backward, and once more forward for blocks
    recomputed as a whole; attention reads half its document on average; the head works for
    supervised tokens alone.
    Source: Kaplan et al., Scaling Laws (2020), section 2.1; Chowdhery et al., PaLM (2022), appendix
    B.
    """
    weights = 0.0
    for name, shape in memory.parameter_shapes(config).items():
        if ".layers." in name and len(shape) > 1:
            weights += shape.numel() * (
                config.n_experts_per_tok / config.n_experts if ".experts." in name else 1
            )
    blocks = 2 * weights + 2 * config.n_layers * config.n_heads * config.head_dim * load.document
    head = 2 * config.vocab_size * config.dim * load.supervised
    return 3 * (blocks + head) + (blocks if checkpointing == 1 else 0)


def sent_bytes(
    config: LMConfig, strategy: str, args, width: int, replicas: int, micro: int, tokens: float
) -> dict:
    """Bytes that each device sends in an optimizer step, with ring algorithms: weights, activations.

    With psi parameters per device and N replicas, times (N - 1) / N: ddp all-reduces gradients, 2
    psi; zero1 then broadcasts the weights, 3 psi (its optimizer lets DDP reduce the whole
    gradient); zero2 gathers the weights in every micro-batch and reduce-scatters gradients once, 2
    psi without accumulation; zero3 gathers twice, 3 psi. Gradients travel as float32, gathered
    weights as what the step computes in.
    Source: Rajbhandari et al., ZeRO (2020), section 7; Korthikanti et al. (2022), section 4.2.2,
    for tensor parallel; Jacobs et al., DeepSpeed Ulysses (2023), section 3.2, for context parallel.

    Args:
        width: bytes of a gathered weight, and of an activation.
        micro: micro-batches per step.
        tokens: of a micro-batch.
    """
    tp, cp = args.tensor_parallel, args.context_parallel
    shapes = memory.parameter_shapes(config)
    psi = sum(s.numel() / (tp if memory.splits(name, s) else 1) for name, s in shapes.items())
    per_parameter = {
        "ddp": 8,
        "zero1": 12,
        "zero2": micro * width + 4,
        "zero3": 2 * micro * width + 4,
    }[strategy]
    weights = per_parameter * psi * (replicas - 1) / replicas
    # A gather and a scatter around attention and MLP, forward and backward; all heads to all tokens
    # and back.
    around = 8 * config.dim * (tp - 1) / tp
    heads = 4 * (config.n_heads + config.n_kv_heads) * config.head_dim / tp * (cp - 1) / cp
    return {
        "weights": weights,
        "activations": micro * tokens / cp * config.n_layers * width * (around + heads),
    }


def step_cost(config: LMConfig, machine: Machine, load: Load, args, devices: int) -> dict:
    """What `devices` devices do in an optimizer step. Times in seconds, sizes in bytes.

    Args:
        args: the flags of a stage; dtype must be set.

    Returns:
        devices, nodes, strategy ('-': nobody to share with), reason, needs (`memory.estimate` of
        every strategy), memory, rows, micro (micro-batches), sent (per device), compute, waiting,
        efficiency, tokens_per_sec.
    """
    sharers = args.tensor_parallel * args.context_parallel
    ranks, width = devices // sharers, 4 if args.dtype == "float32" else 2
    if args.global_batch_size:
        rank_rows = -(-args.global_batch_size // ranks)  # of the rank that has most
        rows, micro = args.global_batch_size, -(-rank_rows // args.batch_size)
    else:
        rank_rows, micro = args.batch_size * args.accumulation_steps, args.accumulation_steps
        rows = rank_rows * ranks
    micro_rows = min(rank_rows, args.batch_size)
    needs, strategy, reason = strategies(
        config, machine, load, args, ranks, micro, micro_rows * load.longest
    )
    replicas, nodes = ranks * args.context_parallel, -(-devices // machine.per_node)
    link = machine.inside if nodes == 1 else min(machine.inside, machine.between)
    near = machine.inside if sharers <= machine.per_node else link
    tokens = micro_rows * load.row_tokens
    sent = sent_bytes(config, strategy, args, width, replicas, micro, tokens)
    messages = message_count(config, strategy, args.bucket_cap_mb, micro)
    latency = machine.latency * math.ceil(math.log2(replicas))
    communication = sent["weights"] / link + messages * latency
    compute = rank_rows * load.row_tokens / machine.tokens_per_sec / sharers
    # DDP sends beside the backward pass of the last micro-batch; FSDP fetches ahead all the time;
    # the broadcast of zero1 comes after the optimizer. The last message always has to be waited
    # for.
    late = communication / 3 if strategy == "zero1" else communication / messages
    window = compute if strategy in ("zero2", "zero3") else compute / micro * 2 / 3
    waiting = max(communication - machine.overlap * window, late) + sent["activations"] / near
    return {
        "devices": devices,
        "nodes": nodes,
        "strategy": strategy if replicas > 1 else "-",
        "reason": reason,
        "needs": needs,
        "memory": needs[strategy]["total"],
        "rows": rows,
        "micro": micro,
        "sent": sum(sent.values()),
        "compute": compute,
        "waiting": waiting,
        "efficiency": rows / ranks / rank_rows * compute / (compute + waiting),
        "tokens_per_sec": rows * load.row_tokens / (compute + waiting),
    }


def message_count(config: LMConfig, strategy: str, bucket_cap_mb: int, micro: int) -> int:
    """Messages of a step with `micro` micro-batches, beside those of activations."""
    groups = config.n_layers + 1
    buckets = -(-4 * memory.parameter_count(config) // (bucket_cap_mb << 20))
    return {
        "ddp": buckets,
        "zero1": 2 * buckets,
        "zero2": (micro + 1) * groups,
        "zero3": (2 * micro + 1) * groups,
    }[strategy]


def strategies(
    config: LMConfig, machine: Machine, load: Load, args, ranks: int, micro: int, tokens: int
) -> tuple[dict, str, str]:
    """What every strategy needs, the one that a run would take, and why.

    Args:
        ranks: data-parallel.
        micro: micro-batches per step.
        tokens: of a micro-batch.
    """
    run = {
        "data_ranks": ranks,
        "tensor_parallel": args.tensor_parallel,
        "context_parallel": args.context_parallel,
        "tokens": tokens,
        "supervised": math.ceil(tokens * load.supervised),
        "dtype": args.dtype,
        "optimizer": args.optimizer,
        "gradient_checkpointing": args.gradient_checkpointing,
        "accumulation_steps": micro,
    }
    available = [s for s in memory.STRATEGIES if s != "zero1" or args.tensor_parallel == 1]
    needs = {s: memory.estimate(config, s, offload=bool(args.offload), **run) for s in available}
    if args.strategy in needs and ranks * args.context_parallel > 1:
        return needs, args.strategy, f"{args.strategy}: asked for"
    return needs, *memory.choose_strategy(
        config, torch.device("cpu"), memory=int(machine.memory), **run
    )
