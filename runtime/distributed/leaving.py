"""How a rank leaves its job."""

import contextlib

import torch.distributed as dist

from runtime.distributed import heartbeat


def wait_for_all() -> None:
    """Wait until all ranks are here.

    torchrun takes the first that a signal has stopped for one that failed, and gives those that
    still save half a minute.
    """
    with contextlib.suppress(RuntimeError):  # another one failed, and says so
        dist.barrier()


def leave(code: int) -> None:
    """Say goodbye. Args: code: what the process exits with; 1, 2: a fault."""
    if code not in (1, 2):  # the silence after a fault tells the others
        heartbeat.stop()
    if code != 1:  # after one they may wait inside a collective
        dist.destroy_process_group()
