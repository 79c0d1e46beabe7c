"""Prompts read in pieces: each continues what its row of the KV cache holds already."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import Decoder, KVCache
from model.layout import Layout, rotary_angles


class Piece(NamedTuple):
    """The next tokens of a prompt."""

    slot: int  # row of the cache
    start: int  # tokens that it holds
    ids: list[int]


def read_pieces(decoder: Decoder, pieces: list[Piece]) -> Tensor:
    """Read pieces of prompts in one pass, packed; returns the logits (pieces, vocab) behind each."""
    ids = sum((piece.ids for piece in pieces), [])
    layout = PieceAttention(decoder.cache, pieces).layout(decoder.model.config)
    device = decoder.cache.kv.device
    tokens = F.pad(torch.tensor([ids]), (0, layout.cos.size(1) - len(ids))).to(device)
    last = torch.tensor([len(piece.ids) for piece in pieces]).cumsum(0) - 1
    return decoder.read_pieces(tokens, layout, last.to(device))


class PieceAttention:
    """What a pass over pieces needs in the place of a cache and of a context.

    As the layout's `cache` it puts new keys and values behind those that are there; as its
    `context` it lets each piece attend to all of its prompt so far.
    """

    STEP = 32  # the row is padded to a multiple of it, as fast products want

    def __init__(self, cache: KVCache, pieces: list[Piece]):
        self.cache, self.pieces, self.layer = cache, pieces, 0

    def layout(self, config) -> Layout:
        device = self.cache.kv.device
        lens = [len(piece.ids) for piece in self.pieces]
        lens = torch.tensor([*lens, -sum(lens) % self.STEP])
        ranges = [torch.arange(p.start, p.start + len(p.ids)) for p in self.pieces]
        positions = torch.cat(ranges)
        rows = torch.tensor([piece.slot for piece in self.pieces]).repeat_interleave(lens[:-1])
        padded = F.pad(positions, (0, int(lens[-1]))).unsqueeze(0).to(device)
        layout = Layout(*rotary_angles(config, padded))
        layout.doc_lens, layout.max_seqlen, layout.docs = lens, int(lens.max()), len(self.pieces)
        layout.cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).int().to(device)
        layout.cache = layout.context = self
        layout.slots = rows.to(device), positions.to(device)
        return layout

    def update(self, layer: int, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        self.layer = layer
        self.cache.write(layer, k, v, *layout.slots)
        return k, v

    def attend(self, document_attention, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Attend: q (1, H, N, D), k and v (1, H_kv, N, D) -> (1, H, N, D)."""
        if not any(piece.start for piece in self.pieces):
            return document_attention(q, k, v, layout)
        out, begin = torch.zeros_like(q), 0
        keys, values = self.cache.kv[self.layer]  # (rows, H_kv, capacity, D) each
        for slot, start, ids in self.pieces:
            end = begin + len(ids)
            row = slice(slot, slot + 1), slice(None), slice(start + len(ids))
            seen = torch.arange(start + len(ids), device=q.device)
            mask = seen <= seen[start:].unsqueeze(1)  # (n, S)
            kv = keys[row].to(q.dtype), values[row].to(q.dtype)
            options = {"attn_mask": mask, "enable_gqa": True}
            out[:, :, begin:end] = F.scaled_dot_product_attention(
                q[:, :, begin:end], *kv, **options
            )
            begin = end
        return out
