"""The variables of a launcher, checked.

torchrun, `accelerate launch` and `deepspeed` all set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT:
what torch needs to join a process group. Some of them alone are no launch: schedulers and job
scripts leave such variables behind.
"""

import os
import sys

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torch.distributed's env://
NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # and their minima


def read_numbers(needed_by: str) -> dict:
    """The fields of `launcher.Launch`; {} where no launcher started this process.

    Args:
        needed_by: a flag that cannot be had without a launcher, or "".

    Raises:
        ValueError: see `launcher.read_launch`.
    """
    numbers = {
        name: whole_number(name, least) for name, least in NUMBERS.items() if name in os.environ
    }
    missing = [name for name in NEEDED if not os.environ.get(name, "").strip()]
    if missing and needed_by:
        given = ", ".join(name for name in (*NEEDED, "LOCAL_RANK") if os.environ.get(name))
        left_behind = f"; of what it sets there is {given}, but no {', '.join(missing)}"
        command = f"torchrun --nproc_per_node 2 {sys.argv[0]} {needed_by}"
        raise ValueError(f"{needed_by} needs a launcher: {command}{left_behind if given else ''}")
    if missing:
        return {}
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    local_rank = numbers.get("LOCAL_RANK", 0)
    local_size = numbers.get("LOCAL_WORLD_SIZE", world_size)
    if rank >= world_size:
        raise ValueError(
            f"RANK is {rank} and WORLD_SIZE {world_size} in the environment: ranks go from 0 to"
            " size - 1"
        )
    if local_rank >= local_size or local_size > world_size:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, LOCAL_WORLD_SIZE {local_size} and WORLD_SIZE"
            f" {world_size} in the environment: each must be less than the next, the sizes may be"
            " equal"
        )
    port = whole_number("MASTER_PORT", 0)
    if port > 65535:
        raise ValueError(f"MASTER_PORT is {port} in the environment: it must lie in 0..65535")
    return {
        "launched": True,
        "rank": rank,
        "local_rank": local_rank,
        "world_size": world_size,
        "local_world_size": numbers.get("LOCAL_WORLD_SIZE", 1),
    }


def whole_number(name: str, least: int) -> int:
    """The value of a variable. ValueError: it is no whole number, or below `least`."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(
            f"{name} is {text!r} in the environment, which is no whole number from {least} on:"
            " unset it, or start with a launcher that sets it, such as torchrun"
        )
    return int(text)
