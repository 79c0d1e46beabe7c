"""Causal attention inside each document of a packed row, and what a forward pass says about its tokens."""

import collections
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.ops import round_up, uncompiled

STEP = 32  # what documents are filled up to a multiple of: a CPU prepares bfloat16 products by their shape, for long
BLOCK = 256  # queries whose scores exist at once; a block of the next ones sees more keys
LOG2_E = math.log2(math.e)  # exp(x) = exp2(x * LOG2_E), which a CPU computes in half the time


class Documents(NamedTuple):
    """The documents of a packed row, padding behind them being the last one."""

    lens: Tensor  # (docs + 1,) int64 on the CPU: how long they are
    begins: Tensor | None = None  # (docs + 2,) int32 on a GPU: where they begin, and the last one ends; elsewhere None
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
    if device.type != "cuda":
        return Documents(lens)
    begins = F.pad(lens.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
    return Documents(lens, begins, int(lens.max()), torch.cuda.get_device_capability(device) >= (8, 0))


def document_attention(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """Causal attention inside each document of a packed row: q (1, H, N, D), k and v (1, H_kv, N, D) -> (1, H, N, D).

    No work outside a document's own triangle, no mask, and no document that depends on its neighbours.
    """
    return on_cpu(q, k, v, docs.lens) if docs.begins is None else in_one_call(q, k, v, docs)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, docs: Documents) -> Tensor:
    """`document_attention` where no backward pass follows."""
    return one_by_one(q, k, v, docs.lens) if docs.begins is None else in_one_call(q, k, v, docs)


@uncompiled  # lengths change all the time
def on_cpu(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    if q.dtype == torch.bfloat16:
        return BlockwiseAttention.apply(q, k, v, tuple(n for n in lens.tolist() if n))
    return one_by_one(q, k, v, lens)


@uncompiled
def one_by_one(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    """A call of torch's own per document."""
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


class BlockwiseAttention(torch.autograd.Function):
    """`document_attention` in bfloat16 on a CPU, with a backward pass of batched products.

    The backward kernel of torch multiplies piece by piece, and has these products prepared anew for every length. Here
    documents lie apart, filled up to a multiple of STEP and sorted, so that those of one length are worked on at once.
    The heads that share keys and values make one long matrix of queries: the product itself sums their gradients.
    Scores are made in float32, as in the forward kernel.

    Source: Dao, FlashAttention-2 (2023), algorithm 2, with blocks of queries and all the keys that they see at once.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lens: tuple[int, ...]) -> Tensor:
        heads, kv_heads = ctx.heads = q.size(1), k.size(1)
        ctx.lens, group = lens, heads // kv_heads
        q, k, v = pack(q, lens), pack(k, lens), pack(v, lens)
        out, log_sums = torch.empty_like(q), torch.empty(len(q), 1)  # log2 of the sum of exp(score), float32
        wide = [apart(t, lens, heads) for t in (q, out, log_sums)]
        narrow = [apart(t, lens, kv_heads) for t in (k, v)]
        for queries, result, log_sum, *pair in zip(*wide, *narrow, strict=True):
            queries = queries.unflatten(0, (-1, group))
            keys, values = (t.unsqueeze(1).expand_as(queries) for t in pair)
            doc, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, is_causal=True)
            result.copy_(doc.flatten(0, 1))
            torch.mul(log.flatten(0, 1).unsqueeze(2), LOG2_E, out=log_sum)
        log_sums[places(lens, heads).fillers] = math.inf  # what fills up a document has no share in anything
        ctx.save_for_backward(q, k, v, log_sums)
        return unpack(out, lens, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, log_sums), lens, (heads, kv_heads) = ctx.saved_tensors, ctx.lens, ctx.heads
        by_q, by_k, by_v = (torch.empty_like(t) for t in (q, k, v))
        wide = [apart(t, lens, heads) for t in (pack(grad, lens), q, log_sums, by_q)]
        narrow = [apart(t, lens, kv_heads) for t in (k, v, by_k, by_v)]
        for tensors in zip(*wide, *narrow, strict=True):
            document_gradients(*tensors)
        scale = q.size(1) ** -0.5
        return (
            unpack(by_q, lens, heads).mul_(scale),
            unpack(by_k, lens, kv_heads).mul_(scale),
            unpack(by_v, lens, kv_heads),
            None,
        )


def document_gradients(
    grad: Tensor, q: Tensor, log_sum: Tensor, by_q: Tensor, k: Tensor, v: Tensor, by_k: Tensor, by_v: Tensor
) -> None:
    """Fill by_q (H, P, D), by_k and by_v (H_kv, P, D) with the gradients of a document, the first two unscaled.

    Args:
        grad, q: (H, P, D) bfloat16.
        log_sum: (H, P, 1) float32, log2 of the sum of exp(score).
        k, v: (H_kv, P, D) bfloat16.
    """
    (heads, length, size), kv_heads = q.shape, len(k)
    scaled = k.float().mul_(size**-0.5 * LOG2_E)
    for at in reversed(range(0, length, BLOCK)):  # the last block is the first to see, and fills, all keys
        end = min(length, at + BLOCK)
        queries, upstream = (t[:, at:end].reshape(kv_heads, -1, size) for t in (q, grad))  # a group of heads as one
        p = torch.bmm(queries.float(), scaled[:, :end].mT)  # (H_kv, group * block, end) float32
        p.view(heads, -1, end).sub_(log_sum[:, at:end]).exp2_().tril_(at)
        p = p.to(q.dtype)
        by_p = torch.bmm(upstream, v[:, :end].mT)
        by_score = torch._softmax_backward_data(by_p, p, -1, q.dtype)
        by_q[:, at:end] = torch.bmm(by_score, k[:, :end]).view(heads, -1, size)
        by_k[:, :end].baddbmm_(by_score.mT, queries, beta=end < length)
        by_v[:, :end].baddbmm_(p.mT, upstream, beta=end < length)


class Places(NamedTuple):
    sources: Tensor  # which (token, head) of a row stands at each place of documents apart
    targets: Tensor  # the place of each (token, head)
    fillers: Tensor  # the places that only fill up a document
    counts: dict[int, int]  # documents of each length, filled up, in the order in which they stand


@functools.lru_cache(maxsize=4)  # the same for all layers of a model
def places(lens: tuple[int, ...], heads: int) -> Places:
    sources, targets, fillers, first = [], [None] * len(lens), [], 0
    head, begins = torch.arange(heads), [0, *itertools.accumulate(lens)]
    order = sorted((round_up(n, STEP), number) for number, n in enumerate(lens))
    for length, number in order:
        n = lens[number]
        token = torch.arange(length)
        place = first + head.unsqueeze(1) * length + token  # (heads, length)
        sources.append(((begins[number] + token.clamp_max(n - 1)) * heads + head.unsqueeze(1)).flatten())
        targets[number] = place[:, :n].T.flatten()
        fillers.append(place[:, n:].flatten())
        first += heads * length
    counts = collections.Counter(length for length, _ in order)
    return Places(torch.cat(sources), torch.cat(targets), torch.cat(fillers), counts)


def pack(x: Tensor, lens: tuple[int, ...]) -> Tensor:
    """(1, H, N, D) -> (places, D): documents by their lengths, each (H, P, D), P its length filled up."""
    return x.transpose(1, 2).reshape(-1, x.size(3)).index_select(0, places(lens, x.size(1)).sources)


def unpack(packed: Tensor, lens: tuple[int, ...], heads: int) -> Tensor:
    """The inverse of `pack`."""
    return packed.index_select(0, places(lens, heads).targets).view(1, -1, heads, packed.size(1)).transpose(1, 2)


def apart(packed: Tensor, lens: tuple[int, ...], heads: int) -> list[Tensor]:
    """The documents, those of one length together, (docs * H, P, D) each, as views."""
    counts = places(lens, heads).counts
    docs = packed.split([count * heads * length for length, count in counts.items()])
    return [doc.view(-1, length, packed.size(1)) for doc, length in zip(docs, counts, strict=True)]
