"""Faster ways to compute what model/ computes, put in from outside; without them all runs, slower.

`apply` replaces the class of a module by a subclass of it: parameters, names and state dict stay.
Each replacement falls back to the plain one at call time where it cannot work: for tensors of
another dtype or device, spread over processes (DTensor), or traced by torch.compile.
"""

import sys
from collections.abc import Iterator

import torch
from torch import nn

from kernels import native
from kernels.attention import FastAttention
from kernels.cross_entropy import FastHead
from kernels.linear import FastLinear, keep_products, pad_row, products
from kernels.norm import FastBlock, FastRMSNorm
from kernels.pointwise import FastSwiGLU
from model import lm

REPLACEMENTS = {
    "cuda": {
        lm.RMSNorm: FastRMSNorm,
        lm.Attention: FastAttention,
        lm.Head: FastHead,
    },
    "cpu": {
        lm.Block: FastBlock,
        lm.RMSNorm: FastRMSNorm,
        lm.Attention: FastAttention,
        lm.SwiGLU: FastSwiGLU,
        nn.Linear: FastLinear,
        lm.Head: FastHead,
    },
}


def available(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which kernels there are for a device and a dtype of matrix products, compiled by now.

    Returns:
        name -> "", or the reason why it is not there.
    """
    if device.type == "cuda":
        return dict.fromkeys(("attention", "cross-entropy", "experts", "decode graph"), "")
    if device.type != "cpu":
        return {"all": f"none for the device {device.type}"}
    reasons = {}
    names = {"ops.cpp": ("norm", "rope", "swiglu", "cross-entropy", "router")}
    names["attention.cpp"] = ("attention",)
    if dtype == torch.bfloat16:
        names["linear.cpp"] = ("linear",)
    for source, kernels in names.items():
        functions = native.library(source, dtype)
        unknown = f"no C++ for {str(dtype).removeprefix('torch.')}"
        reason = "" if functions else native.failures.get(source, unknown)
        reasons |= dict.fromkeys(kernels, reason)
    if reasons.get("linear") == "" and products(dtype) is None:
        reasons["linear"] = "this CPU has no products of bfloat16"
    return reasons


def broken(reasons: dict[str, str]) -> dict[str, str]:
    """Those of `available` that are missing though the device could have them."""
    hopeless = "this CPU", "none for the device"
    return {name: why for name, why in reasons.items() if why and not why.startswith(hopeless)}


def summary(reasons: dict[str, str]) -> str:
    """What is in and why something is not, in a line."""
    names_of: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names_of.setdefault(why, []).append(name)
    parts = [", ".join(names_of.pop("", ["none"]))]
    parts += [f"without {', '.join(names)}: {why}" for why, names in names_of.items()]
    return "; ".join(parts)


def apply(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Put the kernels into a model, or whatever has MiniMindLMs inside. Call it before wrapping it.

    Args:
        device: where the model computes.
        dtype: of the matrix products, autocast's or the model's own.

    Returns:
        See `available`; of those, what this model uses.
    """
    replacements = REPLACEMENTS.get(device.type, {})
    if device.type == "cpu" and "model.lora" in sys.modules:  # else there is no layer of it
        from kernels.lora import FastLoRALinear, LoRALinear

        replacements = {**replacements, LoRALinear: FastLoRALinear}
    if device.type in REPLACEMENTS and has_experts(model):
        from kernels import experts

        replacements = replacements | experts.REPLACEMENTS[device.type]
    for module in model.modules():
        if fast := replacements.get(type(module)):
            module.__class__ = fast
    for language_model in language_models(model) if replacements else ():
        if language_model.make_decoder is None and device.type == "cpu":
            language_model.register_forward_pre_hook(pad_row, with_kwargs=True)
        language_model.make_decoder = make_decoder
        if language_model.gradient_checkpointing:
            keep_products()
    reasons = available(device, dtype)
    if not has_experts(model):
        reasons = {name: why for name, why in reasons.items() if name not in ("router", "experts")}
    return reasons


def has_experts(model: nn.Module) -> bool:
    """Whether there is a mixture of experts in it."""
    moe = sys.modules.get("model.moe")  # else there is no layer of it
    return moe is not None and any(isinstance(module, moe.MoE) for module in model.modules())


def make_decoder(model: lm.MiniMindLM, cache):
    """What generates with a model: a `kv_cache.Decoder`, with the kernels of its device."""
    if cache.kv.device.type == "cuda":
        from kernels.decode_graph import DecodeGraph

        return DecodeGraph(model, cache)
    from kernels import cpu_decoder

    return cpu_decoder.make_decoder(model, cache)


def language_models(model: nn.Module) -> Iterator[lm.MiniMindLM]:
    return (module for module in model.modules() if isinstance(module, lm.MiniMindLM))
