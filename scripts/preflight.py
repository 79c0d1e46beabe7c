"""What can be known to go wrong before a job starts.

Each check raises a ValueError: one line that says what to do.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import math
import shutil
import socket
import sys
from pathlib import Path

import torch

from runtime import launch

MB = 1e6
# Bytes on the disk: weights and two numbers of the optimizer in a checkpoint, weights beside it
PER_PARAMETER = 16


def check_layout(nnodes: int, node_rank: int, master_addr: str | None) -> None:
    """Numbers that cannot be together."""
    if not 0 <= node_rank < nnodes:
        raise ValueError(
            f"--node_rank {node_rank}: {nnodes} nodes (--nnodes) have the numbers 0 to {nnodes - 1}"
        )
    if nnodes > 1 and master_addr is None:
        raise ValueError(
            f"--nnodes {nnodes} needs --master_addr, the address of node 0 as the others reach it"
        )
    if master_addr is not None:
        try:
            socket.getaddrinfo(master_addr, None)
        except OSError as error:
            raise ValueError(f"--master_addr {master_addr}: {error.strerror}") from None


def check_port(port: int) -> None:
    """Whether this host can listen on a port."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # what a run of a minute ago left does not count
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"--master_port {port}: {error.strerror} on this host; choose another one"
            ) from None


def check_engine(engine: str) -> None:
    if engine != "torchrun" and importlib.util.find_spec(engine) is None:
        raise ValueError(f"--engine {engine}: it is not installed; pip install {engine}")


def stage_flags(script: Path, argv: list[str]) -> argparse.Namespace:
    """The flags of a stage script, --config included, as its processes will see them, checked.

    Raises:
        ValueError: an unknown flag, or a value that makes no sense.
    """
    given, sys.argv = sys.argv, [str(script), *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the processes will say it
            flags = importlib.import_module(f"trainer.{script.stem}").parse_args()
    finally:
        sys.argv = given
    launch.check_flags(vars(flags) | {"ddp": True})  # that is for the launcher to see to
    return flags


def check_devices(flags: argparse.Namespace, nproc_per_node: int, nnodes: int) -> None:
    gpus, cuda = torch.cuda.device_count(), flags.device.startswith("cuda")
    if nproc_per_node > gpus and (cuda or gpus and flags.device == "auto"):
        raise ValueError(
            f"--nproc_per_node {nproc_per_node}: torch sees {gpus} GPUs on this host, each process"
            f" needs one; take --nproc_per_node {gpus} or --device cpu"
            if gpus
            else (
                f"--device {flags.device}: torch {torch.__version__} sees no GPU on this host; take"
                " --device cpu"
            )
        )
    sizes = {
        name: vars(flags).get(name, 1) for name in ("tensor_parallel", "context_parallel")
    }  # not every script's
    if nproc_per_node * nnodes % math.prod(sizes.values()):
        asked = " x ".join(f"--{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"{nnodes} x {nproc_per_node} processes cannot be split into groups of {asked}"
        )


def check_data(path: str) -> None:
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise ValueError(f"--data_path {path}: the file is empty")
    except OSError as error:
        raise ValueError(f"--data_path {path}: {error.strerror}") from None


def check_disk(flags: argparse.Namespace) -> str:
    """Room for the checkpoints of a run below --out_dir.

    Returns:
        A warning, or an empty string.

    Raises:
        ValueError: not even one of them fits, or the model cannot be built.
    """
    from runtime.distributed.memory import parameter_count  # here: they take seconds to import
    from runtime.start import open_start

    one = PER_PARAMETER * parameter_count(open_start(flags, "none", required=False).config)
    out_dir = Path(flags.out_dir).absolute()
    place = next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < one:
        raise ValueError(
            f"--out_dir {out_dir}: {free / MB:,.0f} MB free, one checkpoint needs"
            f" {one / MB:,.0f} MB"
        )
    wanted = one * (flags.save_total_limit + 1)
    if free < wanted:
        return (
            f"--out_dir {out_dir}: {free / MB:,.0f} MB free, the checkpoints will need"
            f" {wanted / MB:,.0f} MB"
        )
    return ""
