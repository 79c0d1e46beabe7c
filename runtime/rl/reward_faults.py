"""What went wrong in a reward function, and for which row of the data.

A batch is what the function was called with: prompts, completions, rows.
"""

import math
from collections.abc import Callable


def raised(
    error: Exception, name: str, function: Callable, batch: tuple[list, ...], places: list[str]
) -> str:
    """The function raised an error."""
    place = places[failing_row(function, batch)]
    return f"--reward {name} raised {type(error).__name__} at {place}: {error}"


def failing_row(function: Callable, batch: tuple[list, ...]) -> int:
    """The first row for which a function raises when it is called with that row alone."""
    for n in range(len(batch[0])):
        try:
            function(*(part[n : n + 1] for part in batch))
        except Exception:
            return n
    return 0  # only with all of them


def wrong_values(
    values: object,
    numbers: list[float] | None,
    name: str,
    completions: list[str],
    places: list[str],
) -> str:
    """The function returned what is no number for each row.

    Args:
        values: what it returned.
        numbers: the same as numbers; None where it is no list of numbers.
    """
    if numbers is None:
        fault = f"must return a list of numbers, it returned {type(values).__name__}"
        return f"--reward {name} {fault} for the completions of {places[0]} and on"
    if len(numbers) != len(places):
        fault = f"returned {len(numbers)} numbers for {len(places)} completions"
        return f"--reward {name} {fault}, those of {places[0]} and on"
    value, text, place = next(
        (value, text, place)
        for value, text, place in zip(numbers, completions, places, strict=True)
        if not math.isfinite(value)
    )
    return f"--reward {name} returned {value} at {place} for the completion {text[:60]!r}"
