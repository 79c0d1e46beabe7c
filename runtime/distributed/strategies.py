"""--strategy auto: what a run asks of `memory`."""

import math

from model.lm import LMConfig
from model.lora import TARGETS
from runtime.distributed import memory
from runtime.ranks import data_world, gather_objects, mesh_sizes, world


def choose_strategy(config: LMConfig, dataset, args, dtype: str) -> str:
    """The first strategy that fits the rank with the least memory; prints why.

    Args:
        dataset: has `lengths` and `supervised`, tokens of each row.
        args: the flags of the stage, with `device` a torch.device.
    """
    tokens = args.batch_size * args.max_seq_len
    data_ranks = data_world()[1]
    if args.global_batch_size:  # always set where there are rollouts, without --accumulation_steps
        rows = args.global_batch_size / data_ranks
    else:
        rows = args.batch_size * args.accumulation_steps
    trained = None
    if "lora_targets" in vars(args):
        trained = memory.adapter_size(config, args.lora_targets or TARGETS, args.lora_rank)
    least = min(gather_objects(memory.device_memory(args.device) or 0))
    strategy, reason = memory.choose_strategy(
        config,
        args.device,
        memory=least,
        tokens=tokens,
        supervised=int(tokens * dataset.supervised.sum() / dataset.lengths.sum()),
        accumulation_steps=math.ceil(rows / args.batch_size),
        dtype=dtype,
        optimizer=args.optimizer,
        gradient_checkpointing=args.gradient_checkpointing,
        data_ranks=data_ranks,
        tensor_parallel=mesh_sizes["tensor"],
        context_parallel=mesh_sizes["context"],
        trained=trained,
    )
    if world()[0] == 0:
        print(f"--strategy auto: {reason}", flush=True)
    return strategy
