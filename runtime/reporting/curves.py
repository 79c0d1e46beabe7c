"""Curves of a run's metrics: reading them from metrics.jsonl, smoothing, thinning."""

import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MOST_KEYS = 60  # of a metrics.jsonl: more figures than that nobody looks through


@dataclass
class Curve:
    """A metric over the steps of a run; NaN where it was not finite."""

    steps: np.ndarray  # (N,) float64, ascending
    values: np.ndarray  # (N,) float64

    @property
    def is_finite(self) -> np.ndarray:
        """(N,) bool."""
        return np.isfinite(self.values)

    def finite(self) -> "Curve":
        """The curve without what is not finite."""
        return Curve(self.steps[self.is_finite], self.values[self.is_finite])


@dataclass
class Metrics:
    """What a metrics.jsonl holds."""

    curves: dict[str, Curve]  # by key, in the order of their first lines
    unreadable: int = 0  # lines without a step, or no JSON
    left_out: int = 0  # keys beyond MOST_KEYS


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl line by line; a torn last line is one that is being written."""
    columns: dict[str, tuple[array, array]] = {}
    unreadable, left_out = 0, set()
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = to_float(row.pop("step"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                step = math.nan
            if not math.isfinite(step):
                unreadable += line.endswith(b"\n") and bool(line.strip())
                continue
            for key, value in row.items():
                if value is not None and type(value) not in (int, float):
                    continue
                if key not in columns and len(columns) == MOST_KEYS:
                    left_out.add(hash(key))
                    continue
                steps, values = columns.setdefault(key, (array("d"), array("d")))
                steps.append(step)
                values.append(to_float(value))
    return Metrics(
        {key: to_curve(*both) for key, both in columns.items()}, unreadable, len(left_out)
    )


def to_float(value: object) -> float:
    """A number of JSON, NaN for null and what no float can hold. TypeError: it is no number."""
    if type(value) is float:
        return value
    if value is None:
        return math.nan
    if type(value) is not int:
        raise TypeError(f"{value!r} is no number")
    try:
        return float(value)
    except OverflowError:
        return math.nan


def to_curve(steps: array, values: array) -> Curve:
    """A curve in the order of steps, with NaN for what is infinite, too."""
    order = np.argsort(steps, kind="stable")
    numbers = np.array(values)[order]
    return Curve(np.array(steps)[order], np.where(np.isfinite(numbers), numbers, math.nan))


def smoothing_window(points: int) -> int:
    """Over how many lines a curve of so many is smoothed."""
    return max(5, points // 50)


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean whose weights fall off exponentially, over `smoothing_window` values.

    Args:
        values: (N,), NaN where there is none; the mean goes on behind it.

    Source: Kingma and Ba, Adam (2015), section 3, for the correction of the first values.
    """
    keep = 1 - 1 / smoothing_window(len(values))
    mean, weight, means = 0.0, 0.0, []
    for value in values.tolist():
        if value == value:
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        means.append(mean / weight if weight and value == value else math.nan)
    return np.array(means)


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Which of N points to draw: both extremes of each of equal stretches, and their first gap.

    A spike of a single step stays as high as it was.

    Args:
        values: (N,), NaN for a gap.
        most: about how many points may be left.

    Returns:
        Ascending indices, int64, with the first and the last point among them.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    kept = {0, count - 1}
    edges = np.linspace(0, count, max(1, most // 2) + 1).astype(int)
    low = np.where(np.isfinite(values), values, np.inf)
    high = np.where(np.isfinite(values), values, -np.inf)
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        kept.add(begin + int(low[begin:end].argmin()))
        kept.add(begin + int(high[begin:end].argmax()))
        if np.isnan(values[begin:end]).any():
            kept.add(begin + int(np.isnan(values[begin:end]).argmax()))
    return np.array(sorted(kept))
