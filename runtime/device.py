"""What a device is good at, the order in which it sums, what it holds of a tensor."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def choose_device(name: str, ddp: bool) -> str:
    """What --device means: auto is a GPU where there is one.

    Raises:
        ValueError: mps, that is Apple's GPU, is not there, or cannot do what is asked for.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        has_cuda = torch.cuda.is_available()
        return "cuda" if has_cuda else "mps" if has_mps and not ddp else "cpu"
    if name == "mps" and ddp:
        advice = "leave --ddp out, or take --device cpu"
        raise ValueError(f"--device mps: there are no process groups on Apple's GPU; {advice}")
    if name == "mps" and not has_mps:
        raise ValueError(f"--device mps: torch {torch.__version__} sees no GPU of Apple's here")
    return name


def needs_process_group(device: torch.device, what: str) -> None:
    """ValueError: something needs a process group, and there is none on Apple's GPU."""
    if device.type == "mps":
        fault = f"{what} needs a process group, and there is none on Apple's GPU"
        raise ValueError(f"--device mps: {fault}; take --device cpu, or trainer/train_full_sft.py")


def to_float64(x: Tensor) -> Tensor:
    """In float64, which Apple's GPU lacks: then on the CPU."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a device's fastest products: CPUs may emulate bfloat16, 100 times slower."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def dtype_of(dtype: str | None, device: torch.device) -> str:
    """The dtype of matrix products that --dtype means on a device; None is its default."""
    return dtype or ("bfloat16" if device.type == "cuda" else "float32")


@contextmanager
def one_order(device: torch.device) -> Iterator[None]:
    """Have a GPU sum in the same order every time: a resumed run is bit-identical.

    Some kernels, that of the gradient of attention first, else add in the order in which their
    threads arrive. A CPU has none of these.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists on it
    torch.utils.deterministic.fill_uninitialized_memory = False  # what nobody reads
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def keep_memory() -> None:
    """Have this process keep the memory that a step frees, up to 32 MiB a piece, for the next step.

    Linux would set it to zero, page by page, to give it again. Other C libraries than GNU's stay as
    they are.
    """
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # on Windows
        return
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD, none


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: one that may lie on several processes."""
    return hasattr(tensor, "to_local")
