"""Causal attention inside each document of a packed row, and what a forward pass says about its tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import native
from model.ops import uncompiled


class Documents(NamedTuple):
    """The documents of a packed row, padding behind them being the last one."""

    lens: Tensor  # (docs + 1,) int64 on the CPU: how long they are
    begins: Tensor | None = None  # (docs + 2,) where they begin, and the last one ends: int64, or int32 on a GPU
    longest: int = 0
    flash: bool = False  # whether the GPU has that kernel


@dataclass
class Layout:
    """What one forward pass says about its tokens; the same for all layers."""

    cos: Tensor  # (B, T, 1, head_dim / 2) float32, from the position of each token in its document
    sin: Tensor
    docs: Documents  # of a packed row, or a row each
    attend: Callable | None  # their attention where they stand one behind the other in one row; None: each has a row
    mask: Tensor | None  # (B, 1, T, S) bool: which keys a query sees; None: plain causal attention
    doc_of: Tensor | None  # (B * T,) int64: the document of each token, docs for padding; only where MoE trains
    cache: object | None  # a KVCache
    places: tuple[Tensor, Tensor] | None  # rows and positions in the cache, of the tokens; see `KVCache.write`
    context: object | None  # set where processes share the row and each holds a part of its tokens


def documents(lens: Tensor, device: torch.device) -> Documents:
    """Documents of such lengths (docs + 1,), on the device of a model."""
    begins = F.pad(lens.cumsum(0), (1, 0))
    if device.type == "cpu":
        return Documents(lens, begins)
    begins = begins.int().to(device, non_blocking=True)
    return Documents(lens, begins, int(lens.max()), torch.cuda.get_device_capability(device) >= (8, 0))


def document_attention(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """Causal attention inside each document of a packed row: q (1, H, N, D), k and v (1, H_kv, N, D) -> (1, H, N, D).

    No work outside a document's own triangle, no mask, and no document that depends on its neighbours.
    """
    return on_cpu(q, k, v, docs) if q.device.type == "cpu" else in_one_call(q, k, v, docs)


@uncompiled  # torch.compile cannot see into the kernels, and lengths change all the time
def on_cpu(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    kernels = native.library("attention.cpp", q.dtype)
    if kernels is None or not native.plain(q, k, v):
        return one_by_one(q, k, v, docs.lens)
    return DocumentAttention.apply(q, k, v, docs.begins, kernels)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    """A call of torch's own per document, where there is no compiler for ours: two to four times slower."""
    lens = [n for n in lens.tolist() if n]
    docs = zip(q.split(lens, 2), k.split(lens, 2), v.split(lens, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True) for qkv in docs], dim=2)


def in_one_call(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """On a GPU: a kernel that is told where the documents begin, and works on all of them."""
    where = (docs.begins, docs.begins, docs.longest, docs.longest)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (1, N, H, D)
    if q.dtype != torch.float32 and q.size(3) % 8 == 0 and q.size(3) <= 256 and docs.flash:
        out = torch.ops.aten._flash_attention_forward(q[0], k[0], v[0], *where, 0.0, True, False)[0].unsqueeze(0)
    else:  # another kernel, half as fast, which needs keys and values for each head
        k, v = (t.repeat_interleave(q.size(2) // k.size(2), dim=2) for t in (k, v))
        causal, for_backward = 1, torch.is_grad_enabled()
        out = torch.ops.aten._efficient_attention_forward(q, k, v, None, *where, 0.0, causal, for_backward)[0]
    return out.transpose(1, 2)


class DocumentAttention(torch.autograd.Function):
    """`document_attention` by the kernels of attention.cpp."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, kernels) -> Tensor:
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))  # (1, N, H, D), as projections leave them
        out, logs = torch.empty_like(q), torch.empty(q.shape[1:3])
        ctx.kernels, ctx.sizes = kernels, (len(begins) - 1, k.size(2), q.size(2) // k.size(2), q.size(3))
        native.call(kernels.attention, q, k, v, begins, out, logs, *ctx.sizes)
        ctx.save_for_backward(q, k, v, begins, out, logs)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, grad = ctx.saved_tensors, grad.transpose(1, 2).contiguous()
        by = [torch.empty_like(t) for t in saved[:3]]
        native.call(ctx.kernels.attention_backward, *saved, grad, *by, *ctx.sizes)
        return *(t.transpose(1, 2) for t in by), None, None
