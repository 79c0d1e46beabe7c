"""Generation on a CPU: the forward pass of lm.py without gradients, with weights prepared once.

There is so little to compute in a step that reading the weights, the number of operations and of
passes over memory decide. So matrices that read the same vector are joined, the gains of the norms
are part of the matrices behind them, weights are cast and laid out once, and a layer is three calls
of C++.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.linear import FastLinear
from kernels.native import round_up
from kernels.norm import FastRMSNorm
from kernels.pointwise import apply_rope
from model.kv_cache import Decoder, KVCache
from model.layout import Layout, rotary_angles
from model.lm import RMSNorm

MAX_BYTES = 2**30  # of weights: of more there should be no second copy
LAYERS = (nn.Linear, FastLinear, RMSNorm, FastRMSNorm, nn.Identity)
BLOCK = 32  # rows and columns that cpu_decoder.cpp multiplies at once


def is_supported(model, dtype: torch.dtype) -> bool:
    """Whether `CpuDecoder` can generate with a model: dense, on a CPU, no LoRA, not sharded."""
    config = model.config
    if config.use_moe or not native.is_local_cpu_tensor(model.lm_head.weight):
        return False
    for block in model.model.layers:
        for layer in (*block.self_attn.children(), *block.mlp.children()):
            if type(layer) not in LAYERS:
                return False
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    widths = config.dim, config.hidden_dim, config.n_heads * config.head_dim
    fits = size <= MAX_BYTES and not any(width % BLOCK for width in widths)
    return fits and functions_for(config, dtype) is not None


def functions_for(config, dtype: torch.dtype) -> native.Library | None:
    """The functions of cpu_decoder.cpp for a shape of attention."""
    lanes = math.gcd(config.head_dim // 2, 16)  # numbers in a vector: of 512 bits, or half a head
    group = config.n_heads // config.n_kv_heads
    shape = {"DIM": config.head_dim, "KV": config.n_kv_heads, "GROUP": group}
    return native.library("cpu_decoder.cpp", dtype, LANES=lanes, **shape)


def make_decoder(model, cache: KVCache) -> Decoder:
    """The decoder for a model on a CPU."""
    return (CpuDecoder if is_supported(model, cache.kv.dtype) else Decoder)(model, cache)


def packed(weight: Tensor) -> Tensor:
    """A weight (m, n) as cpu_decoder.cpp reads it, (m / 32, words of n, 32, numbers in a word).

    A word has 4 bytes. Rows are filled up with zeros.
    """
    pair = 4 // weight.itemsize
    if len(weight) % BLOCK:
        weight = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK))
    return weight.view(-1, BLOCK, weight.size(1) // pair, pair).transpose(1, 2).contiguous()


class CpuDecoder(Decoder):
    """The logits of the model but for rounding.

    Args:
        model: a MiniMindLM that `is_supported`.
        cache: its dtype is that of the products.
    """

    prefill_tokens = 2048  # more would outgrow a CPU's cache: xeon_amx.json, generation

    @torch.no_grad()
    def __init__(self, model, cache: KVCache):
        super().__init__(model, cache)
        self.config, self.dtype = model.config, cache.kv.dtype
        self.functions = functions_for(self.config, self.dtype)
        self.embedding, self.layers = model.model.embed_tokens.weight, []
        self.head = self.behind(model.model.norm, model.lm_head.weight)
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            qkv = torch.cat([p.weight for p in projections])
            bias, gains = None, [None, None]
            if self.config.qkv_bias:
                bias = torch.cat([p.bias for p in projections]).detach().float()
            if self.config.qk_norm:
                norms = attention.q_norm, attention.k_norm
                gains = [norm.weight.detach().float().contiguous() for norm in norms]
            gate_up = [
                layer.weight.view(-1, BLOCK // 2, self.config.dim)
                for layer in (mlp.gate_proj, mlp.up_proj)
            ]
            gate_up = torch.stack(gate_up, dim=1).flatten(0, 2)  # half a block of each in turns
            rest = (
                packed(attention.o_proj.weight.to(self.dtype)),
                self.behind(block.post_attention_layernorm, gate_up),
                packed(mlp.down_proj.weight.to(self.dtype)),
            )
            qkv = self.behind(block.input_layernorm, qkv), bias
            self.layers.append((qkv, gains, rest))
        angles = rotary_angles(self.config, torch.arange(cache.kv.size(-2)).unsqueeze(0))
        self.angles = [part.view(-1, self.config.head_dim // 2) for part in angles]

    def behind(self, norm, weight: Tensor) -> Tensor:
        """The weight behind a norm, its gains multiplied in, as `packed` lays it out."""
        return packed((weight * norm.weight).to(self.dtype))

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """As `Decoder.step`. ValueError: a row of the cache is full."""
        config, cache, rows = self.config, self.cache, len(token)
        positions, capacity = cache.lengths.clone(), cache.kv.size(-2)
        if int(positions.max()) >= capacity:
            raise ValueError(f"a row of the cache is full: it has room for {capacity} tokens")
        x = self.embedding[token].float()
        width = config.n_heads * config.head_dim
        attended = torch.empty(round_up(rows, BLOCK), width, dtype=self.dtype)
        slots, sizes = (positions, cache.row_ids), (rows, cache.kv.size(2), capacity)
        for (qkv, gains, rest), kv in zip(self.layers, cache.kv, strict=True):
            inputs = self.project(x, *qkv), *gains, *self.angles, *slots, *kv
            self.functions.attend(*inputs, attended, *sizes, config.norm_eps)
            self.mlp(x, attended, *rest)
        cache.lengths += 1
        return self.logits(x)

    def read(self, ids: Tensor, lens: list[int], last: Tensor) -> Tensor:
        """As `Decoder.read`."""
        ids = F.pad(ids, (0, -ids.size(1) % BLOCK))
        return self.read_pieces(ids, self.model.layout(ids, doc_lens=lens, cache=self.cache), last)

    @torch.no_grad()
    def read_pieces(self, ids: Tensor, layout: Layout, last: Tensor) -> Tensor:
        """As `Decoder.read_pieces`; pieces are followed by padding to a multiple of BLOCK."""
        config, asked = self.config, len(last)
        x = self.embedding[ids[0]].float()
        heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
        with torch.autocast("cpu", enabled=False):
            for index, (qkv, _, rest) in enumerate(self.layers):
                qkv = self.project(x, *qkv).view(1, len(x), -1, config.head_dim)
                q, k, v = qkv.split(heads, dim=2)
                attention = self.model.model.layers[index].self_attn
                q = apply_rope(attention.q_norm(q), layout.cos, layout.sin).transpose(1, 2)
                k = apply_rope(attention.k_norm(k), layout.cos, layout.sin).transpose(1, 2)
                k, v = layout.cache.update(index, k, v.transpose(1, 2), layout)
                attended = attention.attend_packed(q, k, v, layout)
                attended = attended.transpose(1, 2).reshape(len(x), -1)
                if index == len(self.layers) - 1:  # behind it nobody asks for the other tokens
                    last = F.pad(last, (0, -asked % BLOCK))
                    x, attended = x[last], attended[last]
                self.mlp(x, attended, *rest)
        return self.logits(x)[:asked]

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Project x (R, dim) float32 to queries, keys and values, (R, all heads * head_dim)."""
        heads = self.config.n_heads + 2 * self.config.n_kv_heads
        out = torch.empty(len(x), heads * self.config.head_dim, dtype=self.dtype)
        self.functions.project(x, weight, bias, out, *x.shape, out.size(1), self.config.norm_eps)
        return out

    def logits(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), self.config.vocab_size)
        sizes = *x.shape, out.size(1), self.config.norm_eps
        self.functions.project_to_floats(x, self.head, out, *sizes)
        return out

    def mlp(self, x: Tensor, attended: Tensor, *weights: Tensor) -> None:
        """In place: x (R, dim) += out(attended), and then += its MLP."""
        sizes = len(x), attended.size(1), x.size(1), self.config.hidden_dim
        self.functions.mlp(x, attended, *weights, *sizes, self.config.norm_eps)
