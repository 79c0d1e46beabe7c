"""Run a script and print how often this rank exchanged gradients: by DDP, or by FSDP2 once for each
block and the rest.

torchrun --nproc_per_node 2 tests/count_exchanges.py SCRIPT ARGS
"""

import runpy
import sys

import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

made, reduce, exchanges = DDP.__init__, fsdp.foreach_reduce, []


def hook(state, bucket):  # is called with each bucket
    exchanges.extend([1] if bucket.is_last() else [])
    return allreduce_hook(None, bucket)


def init(self, *args, **options):
    made(self, *args, **options)
    self.register_comm_hook(None, hook)


def counted(*args, **options):
    exchanges.append(1)
    return reduce(*args, **options)


if __name__ == "__main__":
    DDP.__init__, fsdp.foreach_reduce = init, counted
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"exchanged {len(exchanges)} times", flush=True)
