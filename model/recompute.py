"""Gradient checkpointing: activations are computed anew in the backward pass, not kept for it."""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

EXPENSIVE = [  # operators whose results level 2 keeps: matrix products and attention
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "_grouped_mm",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
]


def recompute(level: int, block: nn.Module, *args) -> tuple[Tensor, ...]:
    """Call a block, in training with less memory for activations: block(*args).

    Args:
        level: 0 keeps all activations; 1 keeps the input of the block alone; 2 keeps the results of
            EXPENSIVE operators, too.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); Korthikanti et al.,
    Reducing Activation Recomputation in Large Transformer Models (2022), section 5.
    """
    if not level or not block.training:
        return block(*args)
    options = {}
    if level == 2:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, EXPENSIVE)
    return checkpoint(block, *args, use_reentrant=False, **options)
