"""A whole, plain copy of a policy that is sharded or compiled: what then generates."""

import copy

import torch
from torch import nn

from model.lm import MiniMindLM
from model.weights import allocate
from runtime.device import is_sharded


def copy_to_generate(model: MiniMindLM, device: torch.device) -> MiniMindLM:
    """A copy of a model that is not wrapped yet, and may have no memory yet."""
    whole = copy.deepcopy(model).requires_grad_(False)
    if whole.lm_head.weight.is_meta:
        allocate(whole, device)
    return whole


def update_copy(whole: MiniMindLM, model: nn.Module) -> MiniMindLM:
    """Bring a copy up to date; returns it. All ranks call it.

    Args:
        whole: of `copy_to_generate`.
        model: a MiniMindLM, not wrapped in DDP; it may be sharded.
    """
    for p, value in zip(model.parameters(), whole.parameters(), strict=True):
        p = p.detach().to(value.device)
        value.data.copy_(p.full_tensor() if is_sharded(p) else p)
    return whole
