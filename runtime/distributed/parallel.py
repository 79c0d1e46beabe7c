"""What processes do together: how the model is spread over them, and how they agree on a step.
Works alone, too.

Processes form a mesh of data x context x tensor ranks, tensor ranks being neighbours. Ranks of one
tensor group share every layer and see the same tokens; ranks of one context group share every row
of tokens; data ranks have rows of their own. Gradients are averaged over data x context ranks.

Sharded tensors and FSDP2 are imported where they are used: they cost two seconds of every start.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.lm import LMConfig, blocks
from runtime.device import is_sharded, local, one_order
from runtime.distributed import memory
from runtime.distributed.data_parallel import WHY_NOT, RowParallel
from runtime.kernel_loader import compiling, in_use

PATIENCE = timedelta(
    hours=12
)  # of a rank that waits for another one to tokenise; a dead one is noticed at once
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "dp")
SHARDED = ("zero2", "zero3")
WORTH_COMPILING = 2e16  # operations of a run, per process: minutes on a GPU, of which part is saved
_sizes = {"context": 1, "tensor": 1}  # of the mesh; what is left of the processes are data ranks
_groups: dict[str, dist.ProcessGroup] = {}


# --------------------------------------------------------------------------------------------------
# Who is who
# --------------------------------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_world() -> tuple[int, int]:
    """(data rank, data ranks): which share of the rows this process takes."""
    (rank, world_size), sharers = world(), _sizes["context"] * _sizes["tensor"]
    return rank // sharers, world_size // sharers


def replicas() -> int:
    """Ranks over which gradients are averaged: the factor that turns their mean into a sum."""
    return world()[1] // _sizes["tensor"]


def row_split() -> dict[str, int]:
    """What this process takes of a row, for `dataset.collate`."""
    context, tensor = _sizes["context"], _sizes["tensor"]
    return {"part": world()[0] // tensor % context, "parts": context, "multiple": context * tensor}


def make_mesh(
    device: torch.device, strategy: str, context: int, tensor: int, offload: bool = False
) -> None:
    """Lay the processes out as data x context x tensor ranks. Every rank calls it once, before
    anything else here.

    Raises:
        ValueError: the sizes do not divide the number of processes, or the strategy cannot be had
        in this layout.
    """
    processes, alone = world()[1], not dist.is_initialized()
    if processes % (context * tensor):
        asked = f"--context_parallel {context} x --tensor_parallel {tensor}"
        how = "needs --ddp and a launcher" if alone else f"does not divide {processes} processes"
        raise ValueError(
            f"{asked} {how}: torchrun --nproc_per_node {context * tensor} ... --ddp, or a multiple"
            " of it"
        )
    if alone and strategy.startswith("zero"):
        raise ValueError(
            f"--strategy {strategy} shards over processes: add --ddp and start with torchrun"
        )
    if not alone and strategy == "dp":
        raise ValueError(
            "--strategy dp is one process for all GPUs: start it without torchrun and --ddp"
        )
    if tensor > 1 and strategy == "zero1":
        raise ValueError(
            "--strategy zero1 cannot be combined with --tensor_parallel: use zero2, zero3 or ddp"
        )
    if offload and strategy not in SHARDED:
        raise ValueError(f"--offload 1 needs --strategy zero2 or zero3, it is {strategy}")
    _sizes.update(context=context, tensor=tensor)
    if context * tensor > 1:
        from torch.distributed.device_mesh import init_device_mesh

        shape = (processes // (context * tensor), context, tensor)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context", "tensor"))
        _groups.update({name: mesh.get_group(name) for name in ("context", "tensor")})


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def choose_strategy(config: LMConfig, dataset, args, dtype: str) -> str:
    """The strategy of a run: --strategy, or for 'auto' the first that fits the rank with the least
    memory; prints why.

    Args:
        args: the flags of the stage, with `device` a torch.device.
    """
    if args.strategy != "auto" or not dist.is_initialized():
        return args.strategy
    tokens = args.batch_size * args.max_seq_len
    load = {
        "tokens": tokens,
        "supervised": int(tokens * dataset.supervised.sum() / dataset.lengths.sum()),
    }
    rows = (
        args.global_batch_size or args.batch_size * args.accumulation_steps * data_world()[1]
    ) / data_world()[1]
    load["accumulation_steps"] = math.ceil(rows / args.batch_size)
    load |= {
        "dtype": dtype,
        "optimizer": args.optimizer,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    load |= {f"{name}_parallel": size for name, size in _sizes.items()} | {
        "data_ranks": data_world()[1]
    }
    least = min(gather_objects(memory.device_memory(args.device) or 0))
    strategy, reason = memory.choose_strategy(config, args.device, memory=least, **load)
    if world()[0] == 0:
        print(f"--strategy auto: {reason}", flush=True)
    return strategy


def wrap(model: nn.Module, args, dtype: str, global_batch: int) -> nn.Module:
    """The model as the training loop calls it. Make the optimizer from its parameters, and load
    checkpoints, after.

    ddp, zero1: DistributedDataParallel; gradients are views of the communication buckets instead of
    copies. zero2, zero3: FSDP2. Sharded are the blocks, and once more what is left: embedding, norm
    and head. zero2 gathers the weights once per forward and backward pass, zero3 lets go of them in
    between. With tensor parallelism there is always FSDP2 around it, for ddp with shards over a
    single rank.
    Source: Li et al., PyTorch Distributed (2020); Rajbhandari et al., ZeRO (2020); Zhao et al.,
    PyTorch FSDP (2023).

    Args:
        args: the flags device, batch_size, max_seq_len, compile, bucket_cap_mb, strategy ('ddp',
        'zero1', 'zero2',
            'zero3'; outside a process group the model itself, or 'dp') and offload: zero2 and zero3
            then keep weights, gradients and optimizer state in the memory of the CPU.
        dtype: of the weights as FSDP2 gathers them for the blocks; gradients are reduced in
        float32. global_batch: rows of an optimizer step.
    """
    device, strategy = args.device, args.strategy
    if args.compile:
        compiling().compile_blocks(model)
        if (
            strategy not in SHARDED and max(_sizes.values()) == 1
        ):  # else a process may have no room for a whole pass
            with one_order(device):
                compiling().compile_now(model, device, dtype, args.batch_size, args.max_seq_len)
    if not dist.is_initialized():
        if strategy == "dp":
            print(WHY_NOT, flush=True)
        return RowParallel(model) if strategy == "dp" and device.type == "cuda" else model
    if _sizes["context"] > 1:
        from runtime.distributed.context_parallel import Context

        model.context = Context(_groups["context"])
    if _sizes["tensor"] == 1 and strategy not in SHARDED:
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=args.bucket_cap_mb,
            gradient_as_bucket_view=True,  # buffers are not broadcast either: there are none
            # With no_sync in its first step a static graph fails an assert of torch: it needs one
            # micro-batch a step.
            static_graph=global_batch <= args.batch_size * data_world()[1],
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )
    from torch.distributed.tensor import Shard

    shape = (
        (1, replicas(), _sizes["tensor"])
        if strategy in SHARDED
        else (replicas(), 1, _sizes["tensor"])
    )
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard", "tensor"))
    if _sizes["tensor"] > 1:
        from runtime.distributed.tensor_parallel import split_layers

        split_layers(model, mesh["tensor"])
    mesh = mesh["shard"] if strategy in SHARDED else mesh["replica", "shard"]
    options = {"mesh": mesh, "reshard_after_forward": strategy == "zero3"}
    options["offload_policy"] = (
        CPUOffloadPolicy(pin_memory=device.type == "cuda") if args.offload else OffloadPolicy()
    )

    def split_experts(
        p: Tensor,
    ) -> Shard | None:  # inside: there may be fewer of them than processes
        return Shard(1) if p.dim() == 3 and p.size(1) % mesh.shape[-1] == 0 else None

    low = None if dtype == "float32" else getattr(torch, dtype)
    for block in blocks(model):
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(block, mp_policy=policy, shard_placement_fn=split_experts, **options)
    # Embedding and head are gathered in float32: so the residual stream keeps it, as under
    # autocast.
    return fully_shard(model, **options)


def choose_compile(model: nn.Module, dataset, args, dtype: str, global_batch: int) -> int:
    """--compile, or where it is not given: 1 where compiling takes less time than it saves in the
    run; says so then.

    A function of flags, data and the kind of machine, not of a clock: a run that goes on computes
    as it did before. Wins were measured for dense models on GPUs in 16 bits: benchmarks/speed.
    """
    if args.compile is not None:
        return args.compile
    row = args.max_seq_len if args.packing else dataset.lengths.mean()
    tokens = (
        min(args.total_steps * global_batch * row, args.epochs * dataset.lengths.sum()) / world()[1]
    )
    operations = 6 * sum(p.numel() for p in model.parameters()) * tokens
    plain = (
        not model.config.use_moe and not args.gradient_checkpointing and max(_sizes.values()) == 1
    )
    plain = (
        plain
        and args.strategy not in SHARDED
        and in_use()
        and compiling().compiler_works(args.device, dtype)
    )
    if not (plain and operations > WORTH_COMPILING):
        return 0
    if world()[0] == 0:
        print(
            f"--compile 1: half a minute before the first step, for {operations:.1e} operations to"
            " come",
            flush=True,
        )
    return 1


def describe(model: nn.Module, args, dtype: str) -> str:
    """Size and layout of a wrapped model, in a line."""
    shared = "".join(f", {name} parallel x {size}" for name, size in _sizes.items() if size > 1)
    how = (
        f"{args.strategy}{shared}"
        if dist.is_initialized() or args.strategy == "dp"
        else "no strategy"
    )
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = f" ({trained:,} of them trained)" if trained < parameters else ""
    return f"{parameters:,} parameters{frozen} on {world()[1]} x {args.device.type}, {how}, {dtype}"


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, whatever it is wrapped in."""
    return model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else model


# --------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------


@contextmanager
def sync_gradients(model: nn.Module, sync: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients are exchanged only where `sync` is
    true."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(sync)
    held_back = (
        model.no_sync()
        if isinstance(model, DistributedDataParallel) and not sync
        else nullcontext()
    )
    with held_back, one_order(next(model.parameters()).device):
        yield


def is_fsdp(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every token, (K,) float32; logits (K, vocab), whole, in any
    dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def clip_gradients(model: nn.Module, max_norm: float, copies: list[int] | None = None) -> float:
    """Scale gradients in place to a global norm of at most max_norm (0: no limit); returns the norm
    before.

    `copies`: for each parameter the processes that hold the same part of it; by default as it is
    sharded.
    Source: Pascanu et al., On the difficulty of training recurrent neural networks (2013),
    algorithm 1.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [local(p.grad) for p in parameters]
    # In float64: in float32 the norm of a large tensor is off by 1e-4, and not by the same in every
    # layout. That of a row is not, and a CPU takes a tenth of the time for it.
    if gradients[0].device.type == "cpu":
        squares = torch.stack(
            [torch.linalg.vector_norm(g, dim=-1).double().square().sum() for g in gradients]
        )
    else:
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)) ** 2
    if copies is None and is_sharded(parameters[0]):
        copies = [holders(p) for p in parameters]
    if copies is None:  # the same on every rank
        norm = squares.sum().item() ** 0.5
    else:
        norm = (
            sum_over_world((squares / torch.tensor(copies, device=squares.device)).sum())[0] ** 0.5
        )
    scale = max_norm / (norm + 1e-6) if max_norm else 1.0
    if scale < 1.0:  # never for a norm that is not finite
        torch._foreach_mul_(gradients, scale)
    return norm


def holders(p: Tensor) -> int:
    """Processes that hold the same part of a tensor as this one."""
    sizes = zip(p.device_mesh.shape, p.placements, strict=True)
    return (
        math.prod(size for size, placement in sizes if placement.is_replicate())
        * world()[1]
        // p.device_mesh.size()
    )


def as_message(values: tuple[Tensor | float, ...]) -> Tensor:
    """Numbers as one tensor of float64, where the processes can send it from."""
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    if dist.is_initialized() and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def sum_over_world(*values: Tensor | float) -> list[float]:
    """Sum each number over all processes, in one message."""
    numbers = as_message(values)
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers.tolist()


def gather_numbers(*values: Tensor | float) -> list[list[float]]:
    """The numbers of every rank, in rank order, in one message: a table to which each rank adds its
    row."""
    (rank, ranks), numbers = world(), as_message(values)
    table = numbers.new_zeros(ranks, len(values))
    table[rank] = numbers
    if dist.is_initialized():
        dist.all_reduce(table)
    return table.tolist()


def sum_over_ranks(*values: Tensor | float) -> list[float]:
    """Sum each number over data and context ranks; the ranks of a tensor group all know it, there
    it counts once."""
    return [number / _sizes["tensor"] for number in sum_over_world(*values)]


def agree_on_step(grad_norm: float, *values: Tensor | float) -> list[float]:
    """What a step is decided by, the same on all ranks: every one has the numbers of all before it,
    in one message.

    A rank that judged by its own gradients could skip a step, or stop, while others wait for it in
    a collective.

    Args:
        grad_norm: over all parameters, so that it is the same on all ranks.
        values: numbers to sum.

    Returns:
        The gradient norm, which is not finite where one of a rank is not; each value summed as in
        `sum_over_ranks`.

    Raises:
        FloatingPointError: on every rank: what they exchanged is not the same on all; names the
        rank that differs.
    """
    norms, *columns = zip(*gather_numbers(grad_norm, *values), strict=True)
    usual = sorted(norms, key=lambda norm: (not math.isfinite(norm), norm))[(len(norms) - 1) // 2]
    odd = [rank for rank, norm in enumerate(norms) if not is_same_norm(norm, usual)]
    if odd:
        raise FloatingPointError(
            f"gradients differ behind their exchange: their norm is {norms[odd[0]]:.6g} on rank"
            f" {', '.join(map(str, odd))} and {usual:.6g} on rank {norms.index(usual)}; the machine"
            " of that rank is suspect. No weight has changed: go on from the last checkpoint with"
            " --resume auto"
        )
    return [norms[0], *(sum(column) / _sizes["tensor"] for column in columns)]


def is_same_norm(norm: float, usual: float) -> bool:
    """Whether two ranks have the same gradients. Machines of different kinds sum them in different
    orders."""
    if math.isfinite(norm) and math.isfinite(usual):
        return math.isclose(norm, usual, rel_tol=1e-6)
    return math.isfinite(norm) == math.isfinite(usual)


# --------------------------------------------------------------------------------------------------
# In turn
# --------------------------------------------------------------------------------------------------


def gather_objects(value: object) -> list[object]:
    """The value of every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank_zero_first(build: Callable[[], object]) -> object:
    """Run `build` on rank 0, then on the other ranks, which find what it left (a token cache, say).

    Raises:
        ValueError: on every rank, when rank 0 raised one.
    """
    if not dist.is_initialized():
        return build()
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = build()
        except ValueError as raised:
            error = str(raised)
    message = [error]
    dist.broadcast_object_list(message, src=0, group=patient)
    if message[0] is not None:
        raise ValueError(message[0])
    return result if dist.get_rank() == 0 else build()
