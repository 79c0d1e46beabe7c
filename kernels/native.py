"""C++ for CPUs: how kernels/*.cpp is compiled, loaded and called.

The prototype of a C function declares its arguments, and behind each pointer in a comment how many
numbers it points to: `const float *gain /* n */`. Every call is checked against that: dtype, count,
contiguity and device of each tensor. So a swapped argument is an error instead of a wrong result.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.permissions import open_to_others

FOLDER = Path(__file__).parent
CACHE = FOLDER / "__pycache__"  # where Python keeps what it has compiled
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
C_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
TENSORS = {Tensor, torch.nn.Parameter}
DTYPES = {"float": torch.float32, "int64_t": torch.int64, "int32_t": torch.int32}
SCALARS = {"int64_t": (int, ctypes.c_int64), "float": (float, ctypes.c_float)}
failures: dict[str, str] = {}  # source file -> why it could not be compiled


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x use: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@dataclass
class Argument:
    """One argument of a C function: a tensor's `dtype`, or the Python type `scalar`."""

    name: str
    c_type: object
    dtype: torch.dtype | None = None
    size: str = "0"  # how many numbers, in terms of the other arguments
    optional: bool = False
    scalar: type | None = None


def parse_prototypes(source: str, dtype: torch.dtype) -> dict[str, list[Argument]]:
    """The functions that a C++ file exports, with their arguments; T stands for `dtype`."""
    exported = source[source.index('extern "C"') :]
    functions = {}
    for name, text in re.findall(r"^(?:void|int64_t) (\w+)\(([^{]*)\) \{", exported, re.MULTILINE):
        arguments = []
        for part in re.findall(r"[^,/]+(?:/\*[^*]*(?:\*(?!/)[^*]*)*\*/)?", text):
            arguments.append(parse_argument(" ".join(part.split()), dtype))
        functions[name] = arguments
    return functions


def parse_argument(text: str, dtype: torch.dtype) -> Argument:
    """`const T *OPTIONAL branch /* rows * n */` or `int64_t rows`."""
    pointer = re.fullmatch(r"(?:const )?(\w+) \*(OPTIONAL )?(\w+) /\* (.+) \*/", text)
    if pointer:
        kind, optional, name, size = pointer.groups()
        kind = DTYPES.get(kind, dtype)  # T, and words, which hold numbers of type T
        return Argument(name, ctypes.c_void_p, kind, size.replace("/", "//"), bool(optional))
    kind, name = text.split()
    scalar, c_type = SCALARS[kind]
    return Argument(name, c_type, scalar=scalar)


class Function:
    """A function of a library, whose arguments are checked at each call."""

    def __init__(self, function, name: str, arguments: list[Argument], macros: dict[str, int]):
        function.argtypes = [argument.c_type for argument in arguments]
        function.restype = ctypes.c_int64
        self.function, self.name, self.arguments = function, name, arguments
        names = ", ".join(argument.name for argument in arguments)
        sizes = "".join(f"{argument.size}, " for argument in arguments)
        scope = {"round_up": round_up, **macros}
        self.sizes: Callable = eval(f"lambda {names}: ({sizes})", scope)  # our own prototypes

    def __call__(self, *values: Tensor | int | float | None) -> int:
        """Call it. Raises TypeError: an argument that is not what the prototype says; names it."""
        if len(values) != len(self.arguments):
            raise TypeError(f"{self.name} takes {len(self.arguments)} arguments, not {len(values)}")
        sizes, passed = self.sizes(*values), []
        for value, size, argument in zip(values, sizes, self.arguments, strict=True):
            if argument.scalar is not None:
                fits = type(value) is argument.scalar
            elif value is None:
                fits = argument.optional
            else:
                fits = (
                    type(value) in TENSORS
                    and value.is_cpu
                    and value.dtype is argument.dtype
                    and value.numel() == size
                    and value.is_contiguous()
                )
                value = value.data_ptr() if fits else value
            if not fits:
                raise TypeError(f"{self.name}: {argument.name} {describe(argument, size, value)}")
            passed.append(value)
        return self.function(*passed)


def describe(argument: Argument, size: int, value: object) -> str:
    """What an argument must be and what was passed."""
    if argument.scalar is not None:
        return f"must be of type {argument.scalar.__name__}, it is {value!r}"
    wanted = f"must be {size} numbers of {argument.dtype}, contiguous, on the CPU"
    if not isinstance(value, Tensor):
        return f"{wanted}; it is {value!r}"
    kind = "" if value.is_contiguous() else "not contiguous, "
    return f"{wanted}; it is {kind}{tuple(value.shape)} of {value.dtype} on {value.device}"


class Library:
    """A compiled source file; its functions are attributes."""

    def __init__(self, path: Path, prototypes: dict[str, list[Argument]], macros: dict[str, int]):
        functions = ctypes.CDLL(str(path))
        self.path = path
        for name, arguments in prototypes.items():
            if hasattr(functions, name):  # some exist for some CPUs only
                setattr(self, name, Function(getattr(functions, name), name, arguments, macros))


@functools.cache
def library(source: str, dtype: torch.dtype, **macros: int) -> Library | None:
    """The functions of a source file for a dtype; None: there is no compiler, or it failed.

    A file is compiled once, in a second, for this CPU. Its threads are those of torch: OpenMP is in
    this process already, under the same name. Why there is none stands in `failures`.
    """
    if dtype not in C_TYPES:
        return None
    path = FOLDER / source
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-DT={C_TYPES[dtype]}"]
    command += [f"-D{name}={value}" for name, value in macros.items()]
    headers = sorted(FOLDER.glob("*.h"))
    key = repr((command, cpu_features(), *(file.read_bytes() for file in (path, *headers))))
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    prototypes = parse_prototypes(path.read_text(encoding="utf-8"), dtype)
    try:
        return compile_and_load(command, path, CACHE / name, prototypes, macros)
    except FileNotFoundError:
        failures[source] = f"no C++ compiler: {command[0]} is not installed (or set CXX)"
    except subprocess.CalledProcessError as error:
        failures[source] = f"{source} does not compile"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine
            words = error.stderr.decode(errors="replace").strip() or f"exit code {error.returncode}"
            print(f"{' '.join(map(str, error.cmd))}\n{words}", file=sys.stderr, flush=True)
    except OSError as error:
        failures[source] = f"{source}: {error}"
    return None


def compile_and_load(command: list[str], path: Path, target: Path, *rest) -> Library:
    """The library at `target`, compiled if need be; elsewhere where that cannot be written."""
    folder = CACHE if is_private(CACHE) else None
    if folder and target.exists() and not open_to_others(target):
        return Library(target, *rest)
    folder = folder if os.access(CACHE, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=folder) as name:
        built = Path(name) / path.stem
        subprocess.run([*command, path, "-o", built], check=True, capture_output=True)
        if folder:
            built = built.replace(target)  # of processes that compile it at once the last one stays
        return Library(built, *rest)


@functools.cache
def is_private(folder: Path) -> bool:
    """Whether libraries can be kept in a folder, which is made; says if others write there."""
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    if folder.is_dir() and open_to_others(folder):
        print(
            f"{folder} can be written by others: compiled anew, nothing there is run; chmod go-w",
            file=sys.stderr,
        )
        return False
    return True


@functools.cache
def cpu_features() -> str:
    """What tells CPUs with other instructions apart, on Linux: machines may share a folder."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


def is_local_cpu_tensor(*tensors: Tensor) -> bool:
    """Whether tensors lie in this process's memory: not on a GPU, nor spread as DTensors."""
    for x in tensors:  # a loop: this is asked hundreds of times in a step
        if type(x) not in TENSORS or not x.is_cpu:
            return False
    return True


def is_local(*tensors: Tensor) -> bool:
    """Whether tensors are whole ones of this process, on whatever device: no DTensors."""
    return all(type(x) in TENSORS for x in tensors)


def functions_for(x: Tensor, dtype: torch.dtype | None = None) -> Library | None:
    """The functions of ops.cpp for x, or a result in another dtype; None: compute it with torch."""
    if torch.compiler.is_compiling() or not is_local_cpu_tensor(x):
        return None
    return library("ops.cpp", dtype or x.dtype)


def round_up(number: int | Tensor, step: int) -> int | Tensor:
    """The next multiple of `step`; of each number in a tensor of integers."""
    return -(-number // step) * step
