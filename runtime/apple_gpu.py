"""What cannot be had on Apple's GPU, the device mps."""

import torch


def check_mps(ddp: bool) -> None:
    """ValueError: --device mps is asked for, and is not there, or cannot do what is asked for."""
    if ddp:
        advice = "leave --ddp out, or take --device cpu"
        raise ValueError(f"--device mps: there are no process groups on Apple's GPU; {advice}")
    if not torch.backends.mps.is_available():
        raise ValueError(f"--device mps: torch {torch.__version__} sees no GPU of Apple's here")


def needs_process_group(device: torch.device, what: str) -> None:
    """ValueError: something needs a process group, and there is none on Apple's GPU."""
    if device.type == "mps":
        fault = f"{what} needs a process group, and there is none on Apple's GPU"
        raise ValueError(f"--device mps: {fault}; take --device cpu, or trainer/train_full_sft.py")
