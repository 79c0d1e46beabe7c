"""Which process of a job this is: a launcher says it in the environment.

Scripts ask `die_with_launcher` before the imports that take seconds, so this file imports no more
than a few modules of Python itself.
"""

import os
from dataclasses import dataclass

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STARTED_BY = "MINIMIND_STARTED_BY"  # to a process that we start: the id of its parent


@dataclass(frozen=True)
class Launch:
    """This process among those of its job; the defaults are for one that no launcher started."""

    launched: bool = False
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def read_launch(needed_by: str = "") -> Launch:
    """What the launcher of this process says, or the defaults where none started it.

    Args:
        needed_by: a flag that cannot be had without a launcher.

    Raises:
        ValueError: a variable that is no number, numbers that contradict each other, or no launcher
            though it is needed.
    """
    if not needed_by and not any(name in os.environ for name in VARIABLES):
        return Launch()
    from runtime.distributed.environment import read_numbers

    return Launch(**read_numbers(needed_by))


def die_with_launcher() -> None:
    """Have this process killed when its launcher is: an orphan would train on beside its successor.

    Nothing happens where no launcher started it: a run outlives its shell. What this process starts
    is not meant.
    """
    started_by = os.environ.pop(STARTED_BY, None)
    if started_by is not None or "RANK" in os.environ:
        from runtime.distributed import orphans

        orphans.die_with_launcher(started_by)
