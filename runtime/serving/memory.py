"""What serving a model takes of the memory of its device, and what there is."""

import contextlib
from pathlib import Path

import torch

from model.config import LMConfig
from runtime.machine import CONTROL_GROUP, GIB, block_weights, meminfo


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [meminfo("MemAvailable")]
    for limit, taken in CONTROL_GROUP:
        with contextlib.suppress(OSError, ValueError):  # another version, or no limit ("max")
            free.append(int(Path(limit).read_text()) - int(Path(taken).read_text()))
    return max(min(free), 0)


def token_bytes(config: LMConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token."""
    values = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return values * torch.empty((), dtype=dtype).element_size()


def check_weights(name: str, config: LMConfig) -> None:
    """ValueError: the weights, which are read as float32 on the CPU, take more than there is."""
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.dim
    size, free = 4 * (block_weights(config) + embeddings), free_memory(torch.device("cpu"))
    if size > free > 0:
        sizes = f"its weights take {size / GIB:.1f} GiB, {free / GIB:.1f} GiB of memory are free"
        raise ValueError(f"--model {name}: {sizes}; --device_map auto spreads it over devices")


def check_cache(
    config: LMConfig, dtype: torch.dtype, device: torch.device, slots: int, context: int
) -> None:
    """ValueError: the KV cache of an engine takes more than there is; says what would fit."""
    per_token, free = token_bytes(config, dtype), free_memory(device)
    size = slots * context * per_token
    if size > free > 0:
        product = f"{slots} requests x {context} tokens x {per_token / 1024:.0f} KiB"
        sizes = f"{product} = {size / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on {device.type}"
        fits = free * 9 // 10 // (slots * per_token)
        advice = f"--context {fits} fits" if fits >= 64 else "lower --max_concurrent or --context"
        raise ValueError(f"the KV cache takes more memory than there is: {sizes}; {advice}")
