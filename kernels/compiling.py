"""torch.compile, block by block: where it wins, and one compiled code for a resumed run."""

import functools
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from model.lm import MiniMindLM, blocks
from model.permissions import open_to_others


def uncompiled(function: Callable) -> Callable:
    """Have torch.compile call a function as it is; torch.compiler.disable takes 2 s to load."""
    opaque = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return (opaque if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def compiler_works(device: torch.device, dtype: str) -> bool:
    """Whether torch.compile can be had on a device, and wins in this dtype.

    Measured with benchmarks/speed: on a CPU (Xeon, Sapphire Rapids) the C++ of this folder is
    faster, on an H200 float32 gains nothing.
    """
    if device.type == "cpu" or dtype == "float32":
        return False
    from torch.utils._triton import has_triton

    return shutil.which(os.environ.get("CC", "gcc")) is not None and has_triton()


def compile_blocks(model: nn.Module) -> None:
    """Have blocks compiled when first called, for any length: eight of one shape are compiled once.

    Raises:
        ValueError: others can write where torch keeps what it has compiled, and have it run here.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # no public name

    folder = Path(cache_dir())
    if open_to_others(folder):
        remedy = "chmod go-w, or TORCHINDUCTOR_CACHE_DIR=FOLDER"
        raise ValueError(
            f"{folder} can be written by others, and --compile runs what lies there: {remedy}"
        )
    for block in blocks(model):
        block.compile(dynamic=True)


def compile_now(
    model: nn.Module, device: torch.device, dtype: str, documents: int, longest: int
) -> None:
    """Compile the blocks for training, with numbers of tokens that are flags of the run.

    How code splits a sum depends on the number of tokens that it is compiled for. Those of whatever
    batch a run begins or goes on with would let the two differ in the last bits.

    Args:
        model: a MiniMindLM, or what has one inside; its blocks are those of `compile_blocks`.
        documents, longest: of a micro-batch, in tokens.
    """
    lm = next(module for module in model.modules() if isinstance(module, MiniMindLM))
    autocast = nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(device.type, getattr(torch, dtype))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part in (1, 4, 16):  # shorter rows may need code of their own
            lens = [max(1, longest // part)] * documents
            ids = torch.zeros(1, sum(lens), dtype=torch.int64, device=device)
            with autocast:
                layout, x = lm.layout(ids, doc_lens=lens), lm.model.embed_tokens(ids)
                for block in lm.model.layers:
                    x, _ = lm.run_block(block, x, layout)
            if x.requires_grad:
                x.sum().backward()
    model.zero_grad(set_to_none=True)
