"""Easy documents first: --curriculum; and how hard a row is, where a field of it says so."""

import json
import sys
from array import array
from collections.abc import Callable

import numpy as np


def easy_first(order: np.ndarray, difficulty: np.ndarray) -> np.ndarray:
    """The documents of an epoch from easy to hard; equally hard ones stay shuffled.

    A window that --drop_last leaves out then has the hardest ones.

    Args:
        order: (docs,) ids of the documents, shuffled.
        difficulty: (all documents,) numbers.
    """
    return order[np.argsort(difficulty[order], kind="stable")]


class RatedEncoder:
    """A `cache_builder.Encoder` around the one that `make_encoder` makes.

    Attributes:
        difficulty: float64, the number of each piece that was encoded.
    """

    def __init__(self, make_encoder: Callable, field: str):
        self.encoder, self.field = make_encoder(), field
        self.difficulty = array("d")

    def parse(self, row: object) -> tuple[object, float]:
        return self.encoder.parse(row), read_difficulty(row, self.field)

    def encode(self, parsed: list[tuple[object, float]]) -> list[tuple[list, bool]]:
        encoded = self.encoder.encode([item for item, _ in parsed])
        for (pieces, _), (_, difficulty) in zip(encoded, parsed, strict=True):
            self.difficulty.extend([difficulty] * len(pieces))
        return encoded


def read_difficulty(row: object, field: str) -> float:
    """The number in a field of a row; ValueError: there is none."""
    value = row.get(field) if isinstance(row, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and abs(value) <= sys.float_info.max:
        return float(value)
    found = "no such field" if value is None else json.dumps(value)[:40]
    raise ValueError(f"--curriculum field:{field} needs a number there, found {found}")
