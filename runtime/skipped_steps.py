"""Steps that are skipped because their loss or gradient is not finite."""

from collections.abc import Callable

MAX_SKIPPED = 20  # enough for the scale of float16 to come down from its start, 2 ** 14


def count_skipped(progress: dict, numbers: str, tell: Callable[[str], None]) -> None:
    """Count and report a skipped step; all ranks call it.

    Args:
        progress: the run's counters.
        numbers: that are not finite.
        tell: prints a line for people.

    Raises:
        FloatingPointError: the MAX_SKIPPED-th one in a row.
    """
    progress["skipped"] += 1
    progress["skipped_in_a_row"] += 1
    so_far = f"{progress['skipped']} skipped so far"
    tell(f"step {progress['step']} skipped: {numbers} ({so_far})")
    if progress["skipped_in_a_row"] == MAX_SKIPPED:
        raise FloatingPointError(
            f"{MAX_SKIPPED} steps in a row had no finite gradient, the run stops; its weights"
            " and checkpoints are intact: lower --learning_rate, check the data, or use"
            " --dtype bfloat16"
        )
