"""A model as several processes or several GPUs train it: DistributedDataParallel, FSDP2, DataParallel.

Sharded tensors and FSDP2 are imported where they are used: they cost two seconds of every start.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.lm import blocks
from runtime.distributed.mesh import groups
from runtime.ranks import SHARDED, data_world, mesh_sizes, replicas


def wrap(
    model: nn.Module,
    args,
    dtype: str,
    global_batch: int,
    fill: Callable[[nn.Module, torch.device], None] | None,
) -> nn.Module:
    """The model as several processes or GPUs train it; load checkpoints after.

    Args:
        args: the flags device, batch_size, bucket_cap_mb, strategy ('ddp', 'zero1', 'zero2',
            'zero3', or outside a process group 'dp') and offload: zero2 and zero3 then keep
            weights, gradients and optimizer state in the memory of the CPU.
        dtype: of the weights as FSDP2 gathers them for the blocks; gradients are reduced in
            float32.
        global_batch: rows of an optimizer step.
        fill: gives a model of the meta device memory and values, once it is sharded.
    """
    if args.strategy == "dp":
        from runtime.distributed import data_parallel

        print(data_parallel.WHY_NOT, flush=True)
        return data_parallel.RowParallel(model) if args.device.type == "cuda" else model
    if mesh_sizes["context"] > 1:
        from runtime.distributed.context_parallel import Context

        model.context = Context(groups["context"])
    if mesh_sizes["tensor"] == 1 and args.strategy not in SHARDED:
        return replicate(model, args, global_batch)
    return share(model, args, dtype, fill, reshard=args.strategy == "zero3")


def share(
    model: nn.Module,
    args,
    dtype: str,
    fill: Callable[[nn.Module, torch.device], None] | None,
    reshard: bool,
) -> nn.Module:
    """`shard` a model, then give it memory and values; arguments as for both."""
    model = shard(model, args, dtype, reshard)
    if fill is not None:
        fill(model, torch.device("cpu") if args.offload else args.device)
    return model


def replicate(model: nn.Module, args, global_batch: int) -> DistributedDataParallel:
    """ddp, zero1: gradients are views of the communication buckets instead of copies.

    Source: Li et al., PyTorch Distributed (2020).
    """
    return DistributedDataParallel(
        model,
        device_ids=[args.device.index] if args.device.type == "cuda" else None,
        bucket_cap_mb=args.bucket_cap_mb,
        gradient_as_bucket_view=True,  # buffers are not broadcast either: there are none
        # With no_sync in its first step a static graph fails an assert of torch: it needs one
        # micro-batch a step.
        static_graph=global_batch <= args.batch_size * data_world()[1],
    )


def shard(model: nn.Module, args, dtype: str, reshard: bool) -> nn.Module:
    """zero2, zero3, and whatever is tensor parallel: FSDP2 around each block, and around the rest.

    zero2 gathers the weights once per forward and backward pass, zero3 lets go of them in between.
    With tensor parallelism there is always FSDP2 around it, for ddp with shards over one rank.

    Args:
        reshard: let go of the weights after the forward pass. A model that is never trained must.

    Source: Rajbhandari et al., ZeRO (2020); Zhao et al., PyTorch FSDP (2023).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )
    from torch.distributed.tensor import Shard

    device, is_zero = args.device, args.strategy in SHARDED
    shape = (1, replicas()) if is_zero else (replicas(), 1)
    mesh = init_device_mesh(
        device.type,
        (*shape, mesh_sizes["tensor"]),
        mesh_dim_names=("replica", "shard", "tensor"),
    )
    if mesh_sizes["tensor"] > 1:
        from runtime.distributed.tensor_parallel import split_layers

        split_layers(model, mesh["tensor"])
    mesh = mesh["shard"] if is_zero else mesh["replica", "shard"]
    options = {"mesh": mesh, "reshard_after_forward": reshard}
    options["offload_policy"] = (
        CPUOffloadPolicy(pin_memory=device.type == "cuda") if args.offload else OffloadPolicy()
    )

    def split_experts(p: Tensor) -> Shard | None:
        """Inside of each expert: there may be fewer of them than processes."""
        return Shard(1) if p.dim() == 3 and p.size(1) % mesh.shape[-1] == 0 else None

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == "float32" else getattr(torch, dtype),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks(model):
        fully_shard(block, mp_policy=policy, shard_placement_fn=split_experts, **options)
    # Embedding, norm and head are gathered in float32: so the residual stream keeps it, as under
    # autocast.
    return fully_shard(model, **options)
