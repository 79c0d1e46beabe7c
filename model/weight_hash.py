"""Which weights a run began with, in 64 characters."""

import hashlib

from torch import Tensor


def hash_weights(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 of names and bits of float32 weights, wherever they are: which weights these are.

    Every process calls it where they share the weights, which are put together one by one.
    """
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
