"""The memory of this machine."""

import contextlib
from pathlib import Path

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
