"""The processes of a job as a mesh of data x context x tensor ranks, and their turns."""

import math
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed.exchange import sum_over_world
from runtime.distributed.fingerprint import assert_same_start
from runtime.ranks import SHARDED, mesh_sizes, world

# Of a rank that waits for another one to tokenise; a dead one is noticed at once.
PATIENCE = timedelta(hours=12)
groups: dict[str, dist.ProcessGroup] = {}  # "context" and "tensor", where one of them is split


def join_mesh(args) -> None:
    """Refuse processes that were started differently, and lay them out; see `parallel.make_mesh`."""
    assert_same_start(args)
    sizes = (getattr(args, "context_parallel", 1), getattr(args, "tensor_parallel", 1))
    make_mesh(args.device, args.strategy, *sizes, bool(args.offload))


def make_mesh(
    device: torch.device, strategy: str, context: int, tensor: int, offload: bool = False
) -> None:
    """Lay the processes out as data x context x tensor ranks.

    Raises:
        ValueError: the sizes do not divide the processes, or the strategy cannot be had there.
    """
    check_layout(strategy, context, tensor, offload)
    mesh_sizes.update(context=context, tensor=tensor)
    if context * tensor > 1:
        from torch.distributed.device_mesh import init_device_mesh

        shape = (world()[1] // (context * tensor), context, tensor)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context", "tensor"))
        groups.update({name: mesh.get_group(name) for name in ("context", "tensor")})


def check_layout(strategy: str, context: int, tensor: int, offload: bool) -> None:
    """ValueError: the sizes do not divide the processes, or the strategy cannot be had in them."""
    processes = world()[1]
    alone = not dist.is_initialized()
    if processes % (context * tensor):
        asked = f"--context_parallel {context} x --tensor_parallel {tensor}"
        lack = "needs --ddp and a launcher" if alone else f"does not divide {processes} processes"
        command = f"torchrun --nproc_per_node {context * tensor} ... --ddp"
        raise ValueError(f"{asked} {lack}: {command}, or a multiple of it")
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


def holders(p: Tensor) -> int:
    """Processes that hold the same part of a sharded tensor as this one."""
    sizes = zip(p.device_mesh.shape, p.placements, strict=True)
    copies = math.prod(size for size, placement in sizes if placement.is_replicate())
    return copies * world()[1] // p.device_mesh.size()


def sum_of_parts(values: Tensor, parameters: list[Tensor], copies: list[int] | None) -> float:
    """Sum numbers of parameters, (P,), over all processes; each part of a parameter counts once.

    Args:
        copies: of each parameter, the processes that hold the same part of it; None: as sharded.
    """
    if copies is None:
        copies = [holders(p) for p in parameters]
    return sum_over_world((values / torch.tensor(copies, device=values.device)).sum())[0]


def rank_zero_first(build: Callable[[], object]) -> object:
    """Run `build` on rank 0, then on the other ranks; see `parallel.rank_zero_first`."""
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
