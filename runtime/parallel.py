"""How a model is spread over processes, and how they agree on a step.

One process needs none of it: what several need is in `runtime/distributed/`, imported where there
is a process group or --strategy dp.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.lm import LMConfig
from runtime.device import is_sharded, local, to_float64
from runtime.ranks import (  # noqa: F401  # for the scripts
    SHARDED,
    data_world,
    gather_objects,
    mesh_sizes,
    replicas,
    row_split,
    sum_over_ranks,
    unwrap,
    world,
)

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "dp")


def make_mesh(args) -> None:
    """Lay the processes out as data x context x tensor ranks. Every rank calls it, before all else.

    Raises:
        ValueError: the sizes do not divide the processes, the strategy cannot be had there, or a
            process was started with other code, data or flags.
    """
    splits = getattr(args, "context_parallel", 1) * getattr(args, "tensor_parallel", 1)
    if dist.is_initialized() or splits > 1 or args.strategy.startswith("zero") or args.offload:
        from runtime.distributed import mesh

        mesh.join_mesh(args)


def choose_strategy(config: LMConfig, dataset, args, dtype: str) -> str:
    """The strategy of a run: --strategy, or for 'auto' the first that fits; prints why."""
    if args.strategy != "auto" or not dist.is_initialized():
        return args.strategy
    from runtime.distributed import strategies

    return strategies.choose_strategy(config, dataset, args, dtype)


def choose_compile(model: nn.Module, dataset, args, dtype: str, global_batch: int) -> int:
    """--compile, or where it is not given: 1 where compiling takes less time than it saves."""
    if args.compile is not None or args.device.type == "cpu":  # which is faster with our own C++
        return args.compile or 0
    from runtime import compilation

    return compilation.choose_compile(model, dataset, args, dtype, global_batch)


def wrap(
    model: nn.Module, args, dtype: str, global_batch: int, fill: Callable | None = None
) -> nn.Module:
    """The model as the training loop calls it; the optimizer is made of its parameters.

    Args:
        args: the flags of the stage; `strategy` is chosen.
        dtype: of the matrix products; gradients are reduced in float32.
        global_batch: rows of an optimizer step.
        fill: of `start.Start`; where processes share a model: gives it memory and values.
    """
    if args.compile:
        from runtime import compilation

        compilation.compile_model(model, args, dtype)
    if args.strategy != "dp" and not dist.is_initialized():
        return model
    from runtime.distributed import wrapping

    return wrapping.wrap(model, args, dtype, global_batch, fill)


def describe(model: nn.Module, args, dtype: str) -> str:
    """Size and layout of a wrapped model, in a line."""
    layout = "no strategy"
    if dist.is_initialized() or args.strategy == "dp":
        shared = (f", {name} parallel x {size}" for name, size in mesh_sizes.items() if size > 1)
        layout = f"{args.strategy}{''.join(shared)}"
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = f" ({trained:,} of them trained)" if trained < parameters else ""
    devices = f"{world()[1]} x {args.device.type}"
    return f"{parameters:,} parameters{frozen} on {devices}, {layout}, {dtype}"


def sync_gradients(model: nn.Module, sync: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: exchange gradients only where `sync` is true."""
    if not dist.is_initialized() and next(model.parameters()).device.type == "cpu":
        return nullcontext()
    from runtime import gradient_sync

    return gradient_sync.sync_gradients(model, sync)


def clip_gradients(model: nn.Module, max_norm: float, copies: list[int] | None = None) -> float:
    """Scale gradients in place to a global norm of at most max_norm; returns the norm before.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks (2013),
    algorithm 1.

    Args:
        max_norm: 0 for no limit.
        copies: of each parameter, the processes that hold the same part of it; by default as it is
            sharded.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [local(p.grad) for p in parameters]
    # In float64: in float32 the norm of a large tensor is off by 1e-4, and not by the same in every
    # layout. That of a row is not, and a CPU takes a tenth of the time for it.
    if gradients[0].device.type != "cuda":
        norms = [torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]
        parts = to_float64(torch.cat(norms)).square().split([len(norm) for norm in norms])
        squares = torch.stack([part.sum() for part in parts])
    else:
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)) ** 2
    if copies is None and not is_sharded(parameters[0]):  # the same on every rank
        total = squares.sum().item()
    else:
        from runtime.distributed.mesh import sum_of_parts

        total = sum_of_parts(squares, parameters, copies)
    norm = total**0.5
    scale = max_norm / (norm + 1e-6) if max_norm else 1.0
    if scale < 1.0:  # never for a norm that is not finite
        torch._foreach_mul_(gradients, scale)
    return norm


def agree_on_step(grad_norm: float, *values: Tensor | float) -> list[float]:
    """What a step is decided by, the same on all ranks: the gradient norm, sums of other numbers.

    Raises:
        FloatingPointError: on every rank, where the norm differs: names the rank.
    """
    if not dist.is_initialized():
        return [float(number) for number in (grad_norm, *values)]
    from runtime.distributed import replicas as checks

    return checks.agree_on_step(grad_norm, *values)


def check_replicas(model: nn.Module, step: int, every: int) -> None:
    """At every `every`-th step (0: never): do ranks that must hold the same weights hold them?

    Raises:
        FloatingPointError: on every rank; names the first tensor and the rank that differs.
    """
    if world()[1] > 1 and every and step % every == 0:
        from runtime.distributed import replicas as checks

        checks.check_replicas(model, step)


def rank_zero_first(build: Callable[[], object]) -> object:
    """Run `build` on rank 0, then on the other ranks, which find what it left (a token cache, say).

    Raises:
        ValueError: on every rank, when rank 0 raised one.
    """
    if not dist.is_initialized():
        return build()
    from runtime.distributed import mesh

    return mesh.rank_zero_first(build)
