"""The memory of this machine, and whether a model's weights fit in."""

import contextlib
from pathlib import Path

from runtime.launcher import read_launch

GIB = 2**30

# Files that say how many bytes a container may take and has taken: of version 2, of version 1
CONTROL_GROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def meminfo(name: str) -> int:
    """Bytes that a line of /proc/meminfo says; 0: it cannot be read."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def machine_memory() -> int:
    """Bytes of this machine's RAM, or of what its control group may take of it; 0: unreadable."""
    limits = [meminfo("MemTotal")]
    for limit, _ in CONTROL_GROUP:
        # Another version of control groups, or no limit ("max")
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(limit).read_text()))
    return min(limits)


def check_memory(config) -> None:
    """Refuse a model whose weights are larger than the memory of the machines that train it.

    Args:
        config: an LMConfig.

    Raises:
        ValueError: names the flags, the weights and the memory.
    """
    launched = read_launch()
    size = 4 * block_weights(config)
    memory = machine_memory() * max(1, launched.world_size // launched.local_world_size)
    if size > memory > 0:
        shape = f"--dim {config.dim} --n_layers {config.n_layers}"
        moe = f" --n_experts {config.n_experts}" if config.use_moe else ""
        raise ValueError(
            f"{shape}{moe}: the model has {size / GIB:,.0f} GiB of weights, more than the"
            f" {memory / GIB:,.0f} GiB of memory here: take a smaller one"
        )


def block_weights(config) -> int:
    """Weights in the matrices of all blocks, by their sizes: nothing is built, however large."""
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    mlp = 3 * config.hidden_dim
    if config.use_moe:
        experts = config.n_experts + config.n_shared_experts
        mlp = config.n_experts + 3 * experts * config.moe_hidden_dim
    return config.n_layers * config.dim * (attention + mlp)
