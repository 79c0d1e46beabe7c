"""What a checkpoint holds of a run: tensors under the names of the parameters, random generators."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from runtime.ranks import unwrap

COUNTERS = ("step", "epoch", "step_in_epoch", "tokens", "skipped", "skipped_in_a_row")


def parts_of(optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that one, such as Muon, consists of."""
    return list(getattr(optimizer, "parts", {"": optimizer}).values())


def states_of(model: nn.Module, optimizer) -> dict[str, tuple[Tensor, dict, dict]]:
    """Name -> (parameter, its optimizer state, its options), for what this process updates."""
    names = {p: name for name, p in unwrap(model).named_parameters()}
    states = {}
    for part in parts_of(optimizer):
        part = getattr(part, "optim", part)  # ZeroRedundancyOptimizer holds one for its share
        for group in part.param_groups:
            states |= {names[p]: (p, part.state[p], group) for p in group["params"]}
    return states


def run_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """Everything large that training changes, by name.

    Parameters under `model.NAME`, what the optimizer keeps for them under `optimizer.NAME.KEY`.
    Frozen parameters come from where they came from at the start.
    """
    tensors = {
        f"model.{name}": p.detach()
        for name, p in unwrap(model).named_parameters()
        if p.requires_grad
    }
    for name, (_, state, _) in states_of(model, optimizer).items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


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
