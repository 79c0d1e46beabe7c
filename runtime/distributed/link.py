"""What the link between processes can do: an all-reduce, checked and measured.

Also in processes that are started for it.
"""

import os
import socket
import statistics
import subprocess
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.launcher import STARTED_BY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(
    device: torch.device, group: dist.ProcessGroup | None = None, size: int = 1 << 24
) -> dict:
    """All-reduce `size` bytes over a process group, and a single number. Every rank calls it.

    Returns:
        ranks; right: whether the sums were; latency in seconds; bandwidth: bytes/s that each
        process sends. Medians.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def timed(elements: int) -> tuple[float, bool]:
        times, right = [], True
        for _ in range(4):  # the first one warms up
            tensor = torch.full((elements,), float(rank + 1), device=device)
            begin = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            right = (
                tensor == ranks * (ranks + 1) / 2
            ).all().item() and right  # .item() waits for a GPU
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:]), right

    (latency, first), (large, second) = timed(1), timed(size // 4)
    bandwidth = 2 * size * (ranks - 1) / ranks / max(large - latency, 1e-9)
    return {"ranks": ranks, "right": first and second, "latency": latency, "bandwidth": bandwidth}


def measure_alone(backend: str, seconds: float) -> dict:
    """`measure` in the process group that the environment describes, which has no other purpose."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    try:
        return measure(device)
    finally:
        dist.destroy_process_group()


def run_processes(command: list[str], processes: int, seconds: float) -> str:
    """Run a command as so many ranks on this machine; what is left when time is over is killed.

    Returns:
        The last line that rank 0 printed.

    Raises:
        TimeoutError: they did not end.
        RuntimeError: one failed; its last line on stderr.
    """
    # Of a launch around this one nothing may reach them.
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")
    }
    variables |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
    }
    variables |= {
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
        STARTED_BY: str(os.getpid()),
    }
    end, started = time.monotonic() + seconds, []
    try:
        for rank in map(str, range(processes)):
            streams = {
                name: tempfile.TemporaryFile("w+", errors="replace")
                for name in ("stdout", "stderr")
            }
            process = subprocess.Popen(
                command, env=variables | {"RANK": rank, "LOCAL_RANK": rank}, **streams
            )
            started.append((process, streams))
        while None in (codes := [process.poll() for process, _ in started]):
            if any(codes):  # one failed, and the others may wait for it for ever
                break
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            time.sleep(0.05)
        if any(codes):
            failed = next(
                streams for (_, streams), code in zip(started, codes, strict=True) if code
            )
            lines = [line for line in read(failed["stderr"]) if line.strip()] or [
                "it died without a word"
            ]
            raise RuntimeError(" ".join(lines[-1].split())[:200])
        return read(started[0][1]["stdout"])[-1]
    finally:
        for process, streams in started:
            process.kill()
            process.wait()
            for stream in streams.values():
                stream.close()


def read(stream) -> list[str]:
    stream.seek(0)
    return stream.read().splitlines()
