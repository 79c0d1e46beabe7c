"""What a device is good at, and what a process holds of a tensor."""

import ctypes

import torch
from torch import Tensor


def choose_device(name: str, ddp: bool) -> str:
    """What --device means: auto is a GPU where there is one.

    Raises:
        ValueError: see `apple_gpu.check_mps`.
    """
    if name == "mps":
        from runtime.apple_gpu import check_mps

        check_mps(ddp)
    if name != "auto":
        return name
    has_mps = torch.backends.mps.is_available() and not ddp
    return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"


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
