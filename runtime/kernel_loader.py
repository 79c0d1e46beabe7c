"""The one door to kernels/, without which everything runs, too; or with MINIMIND_KERNELS=off."""

import os
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "kernels"
MODES = ("auto", "off", "require")
_line = ""  # what the last call of `apply_kernels` put in


def package():
    """kernels/, or None, as MINIMIND_KERNELS says: auto (default), off or require.

    Raises:
        ValueError: it says something else, or requires what is not there.
    """
    mode = os.environ.get("MINIMIND_KERNELS") or "auto"
    if mode not in MODES:
        raise ValueError(f"MINIMIND_KERNELS={mode}: must be {', '.join(MODES)}")
    if not (FOLDER / "__init__.py").is_file():
        if mode == "require":
            raise ValueError("MINIMIND_KERNELS=require: the folder kernels/ is missing")
        return None
    if mode == "off":
        return None
    import kernels

    return kernels


def apply_kernels(model: nn.Module, device: torch.device, dtype: str) -> None:
    """Put kernels into a model before it is wrapped; `report` says which.

    Args:
        dtype: of the matrix products, as --dtype spells it.

    Raises:
        ValueError: MINIMIND_KERNELS=require, and one cannot be had.
    """
    global _line
    kernels = package()
    if kernels is None:
        is_there = (FOLDER / "__init__.py").is_file()
        _line = f"kernels: none ({'MINIMIND_KERNELS=off' if is_there else 'the folder is missing'})"
        return
    states = kernels.apply(model, device, getattr(torch, dtype))
    _line = f"kernels: {kernels.summary(states)}"
    missing = kernels.broken(states)
    if missing and os.environ.get("MINIMIND_KERNELS") == "require":
        raise ValueError(f"MINIMIND_KERNELS=require: {kernels.summary(missing)}")


def report() -> str:
    """What is in and why something is not, in a line; empty before `apply_kernels`."""
    return _line
