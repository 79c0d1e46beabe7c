"""The one door to kernels/, without which everything runs, too; or with MINIMIND_KERNELS=off."""

import os
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "kernels"
MODES = ("auto", "off", "require")
_line = ""  # what the last call of `apply_kernels` put in


def mode() -> str:
    """MINIMIND_KERNELS: auto (default), off, or require: an error where a kernel cannot be had."""
    value = os.environ.get("MINIMIND_KERNELS") or "auto"
    if value not in MODES:
        raise ValueError(f"MINIMIND_KERNELS={value}: must be {', '.join(MODES)}")
    if value == "require" and not installed():
        raise ValueError("MINIMIND_KERNELS=require: the folder kernels/ is missing")
    return value


def installed() -> bool:
    return (FOLDER / "__init__.py").is_file()


def in_use() -> bool:
    return mode() != "off" and installed()


def apply_kernels(model: nn.Module, device: torch.device, dtype: str) -> None:
    """Put kernels into a model before it is wrapped; `report` says which.

    Args:
        dtype: of the matrix products, as --dtype spells it.

    Raises:
        ValueError: MINIMIND_KERNELS=require, and one cannot be had.
    """
    global _line
    if not in_use():
        reason = "the folder is missing" if not installed() else "MINIMIND_KERNELS=off"
        _line = f"kernels: none ({reason})"
        return
    import kernels

    states = kernels.apply(model, device, getattr(torch, dtype))
    _line = f"kernels: {kernels.summary(states)}"
    if mode() == "require" and (missing := kernels.broken(states)):
        raise ValueError(f"MINIMIND_KERNELS=require: {kernels.summary(missing)}")


def report() -> str:
    """What is in and why something is not, in a line; empty before `apply_kernels`."""
    return _line


def fingerprint(device: torch.device, dtype: str) -> str:
    """The kernels that a run in this process uses, which must be the same in all of its job."""
    if not in_use():
        return "off"
    import kernels

    states = kernels.available(device, getattr(torch, dtype))
    return ", ".join(name for name, why in states.items() if not why) or "none in C++"


def compiling():
    """The module with what --compile needs. ValueError: it is not to be had."""
    if not in_use():
        raise ValueError(
            f"--compile 1 needs kernels/, but there is {_line or 'MINIMIND_KERNELS=off'}"
        )
    from kernels import compiling

    return compiling
