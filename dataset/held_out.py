"""The rows of a file that are kept from training, to evaluate on: --eval_ratio."""

import numpy as np


def hold_out(rows: int, eval_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `packing.split_rows`, of a ratio that is not 0."""
    held_out = round(rows * eval_ratio)
    if eval_ratio > 0 and not 0 < held_out < rows:
        parts = f"holds out {held_out}, trains on {rows - held_out}"
        raise ValueError(f"--eval_ratio {eval_ratio} of {rows} rows {parts}")
    shuffled = np.random.default_rng([seed, 2**31]).permutation(rows)  # epochs have other streams
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])
