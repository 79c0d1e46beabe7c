"""What a checkpoint holds of a run: tensors under the names of the parameters, random generators."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from runtime.ranks import unwrap

COUNTERS = ("step", "epoch", "step_in_epoch", "tokens", "skipped", "skipped_in_a_row")


def run_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """Everything large that training changes, by name.

    Parameters under `model.NAME`, what the optimizer keeps for them under `optimizer.NAME.KEY`.
    Frozen parameters come from where they came from at the start.
    """
    names = {p: name for name, p in unwrap(model).named_parameters()}
    tensors = {f"model.{name}": p.detach() for p, name in names.items() if p.requires_grad}
    for part in parts_of(optimizer):
        for p, state in part.state.items():
            tensors |= {f"optimizer.{names[p]}.{key}": value for key, value in state.items()}
    return tensors


def parts_of(optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that hold state: those that one, such as Muon, consists of; ZeRO's own one."""
    parts = getattr(optimizer, "parts", {"": optimizer}).values()
    return [getattr(part, "optim", part) for part in parts]


def rng_state() -> dict:
    """State of this rank's generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state
