"""Functions in C++ for what operations of torch do in many passes over memory, on a CPU: model/*.cpp."""

import contextlib
import ctypes
import functools
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
KINDS = {Tensor, torch.nn.Parameter}
FOLDER = Path(__file__).parent / "__pycache__"  # where Python keeps what it has compiled
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


@functools.cache
def cpu() -> str:
    """What tells CPUs with other instructions apart, on Linux: a folder may be shared by machines."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def open_to_others(path: Path) -> bool:
    """Whether somebody else can have put code there: neither we, root nor the owner of this file own it, or more may
    write to it than its owner and our own group."""
    found = path.stat()
    loose = stat.S_IWOTH if found.st_gid == os.getgid() else stat.S_IWOTH | stat.S_IWGRP
    return found.st_uid not in (0, os.getuid(), os.stat(__file__).st_uid) or bool(found.st_mode & loose)


@functools.cache
def is_private(folder: Path) -> bool:
    """Whether compiled functions can be kept in a folder, which is made; if others can write there, a line says so."""
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    if folder.is_dir() and open_to_others(folder):
        print(f"{folder} can be written by others: compiled anew, nothing there is run; chmod go-w", file=sys.stderr)
        return False
    return True


@functools.cache
def library(source: str, dtype: torch.dtype, **macros: int) -> ctypes.CDLL | None:
    """The functions of a source file beside this one for a dtype; None: there is no compiler, or none that can.

    They are compiled once, in a second, for this CPU. Their threads are those of torch: OpenMP is in this process
    already, under the same name.
    """
    if dtype not in TYPES:
        return None
    path = Path(__file__).with_name(source)
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-DT={TYPES[dtype]}"]
    command += [f"-D{name}={value}" for name, value in macros.items()]
    key = repr((command, cpu(), *(file.read_bytes() for file in (path, *sorted(path.parent.glob("*.h"))))))
    folder = FOLDER if is_private(FOLDER) else None
    target = FOLDER / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if folder and target.exists() and not open_to_others(target):
            return ctypes.CDLL(str(target))
        folder = folder if os.access(FOLDER, os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=folder) as name:
            built = Path(name) / path.stem
            subprocess.run([*command, path, "-o", built], check=True, capture_output=True)
            if folder:
                built = built.replace(target)  # of processes that compile it at once, the last one's stays
            return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(*tensors: Tensor) -> bool:
    """Whether tensors lie in the memory of this process: not on a GPU, or spread over processes (DTensor)."""
    for x in tensors:  # a loop: this is asked hundreds of times in a step
        if type(x) not in KINDS or not x.is_cpu:
            return False
    return True


def call(function, *args: Tensor | int | float | None) -> None:
    """Call a function of a library. Tensors, which must be contiguous, are passed as their first element's address."""
    function(*[argument(arg) for arg in args])


def argument(value: Tensor | int | float | None):
    if type(value) is int:
        return ctypes.c_int64(value)
    if type(value) is float:
        return ctypes.c_float(value)
    if value is None:
        return None
    assert plain(value) and value.is_contiguous()
    return ctypes.c_void_p(value.data_ptr())
