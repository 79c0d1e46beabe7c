"""Generation on a CPU: the forward pass of lm.py without gradients, with weights prepared once for all its steps.

There is so little to compute in a step that reading the weights, the number of operations and of passes over memory
decide. So matrices that read the same vector are joined, the gains of the norms are part of the matrices behind them,
weights are cast and laid out once, and a layer is three calls of what is compiled from cpu_decoder.cpp.
"""

import ctypes
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import native
from model.ops import Linear, apply_rope, rms_norm, round_up

MOST = 2**30  # bytes of weights: of more there should be no second copy
BLOCK = 32  # rows and columns that cpu_decoder.cpp multiplies at once


def suits(model, dtype: torch.dtype) -> bool:
    """Whether a model is one that `CpuDecoder` knows: dense, on a CPU, its layers plain ones (no LoRA, not sharded)."""
    layers = [module for block in model.model.layers for module in (*block.self_attn.children(), *block.mlp.children())]
    plain = all(type(layer) is Linear for layer in layers if not hasattr(layer, "eps"))  # what has one is a norm
    plain = plain and not model.config.use_moe and type(model.lm_head.weight) is torch.nn.Parameter
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if not plain or model.lm_head.weight.device.type != "cpu" or size > MOST:
        return False
    config = model.config
    sizes = config.dim, config.hidden_dim, config.n_heads * config.head_dim
    return not any(size % BLOCK for size in sizes) and kernels(config, dtype) is not None


def lanes(config) -> int:
    """Numbers in a vector, at most: of 512 bits, or what half a head has room for."""
    return math.gcd(config.head_dim // 2, 16)


def kernels(config, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of cpu_decoder.cpp for a shape of attention; None: there is no compiler, or none that can."""
    shape = {"DIM": config.head_dim, "KV": config.n_kv_heads, "GROUP": config.n_heads // config.n_kv_heads}
    return native.library("cpu_decoder.cpp", dtype, LANES=lanes(config), **shape)


def packed(weight: Tensor) -> Tensor:
    """A weight (m, n) as cpu_decoder.cpp reads it: (m / 32, words of n, 32, numbers in a word of 4 bytes).

    Rows are filled up with zeros.
    """
    weight, pair = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK)), 4 // weight.itemsize
    return weight.view(-1, BLOCK, weight.size(1) // pair, pair).transpose(1, 2).contiguous()


class CpuDecoder:
    """Calls as `model(token.unsqueeze(1), cache=cache)` does it: the same logits but for rounding.

    Args:
        model: a MiniMindLM that `suits`.
        cache: a KVCache, whose dtype is that of the products.
    """

    @torch.no_grad()
    def __init__(self, model, cache):
        self.config, self.cache, self.dtype, self.layout = model.config, cache, cache.kv.dtype, model.layout
        self.kernels = kernels(self.config, self.dtype)
        self.embedding, self.layers = model.model.embed_tokens.weight, []
        self.head = self.behind(model.model.norm, model.lm_head.weight)
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
            gains = [norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm)]
            halves = [layer.weight.view(-1, BLOCK // 2, self.config.dim) for layer in (mlp.gate_proj, mlp.up_proj)]
            gate_up = self.behind(block.post_attention_layernorm, torch.stack(halves, dim=1).flatten(0, 2))
            out, down = (packed(layer.weight.to(self.dtype)) for layer in (attention.o_proj, mlp.down_proj))
            self.layers.append((self.behind(block.input_layernorm, torch.cat(qkv)), gains, (out, gate_up, down)))
        positions = torch.arange(cache.kv.size(-2)).unsqueeze(0)
        self.angles = [part.view(-1, self.config.head_dim // 2) for part in model.rotation(positions)]

    def behind(self, norm, weight: Tensor) -> Tensor:
        """The weight behind a norm, its gains multiplied in, as `packed` lays it out."""
        return packed((weight * norm.weight).to(self.dtype))

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """token (R,) int64, R being the rows of the cache -> logits (R, vocab) float32. ValueError: a row is full."""
        config, cache, places, rows = self.config, self.cache, self.cache.lengths.clone(), len(token)
        if int(places.max()) >= cache.kv.size(-2):
            raise ValueError(f"a row of the cache is full: it has room for {cache.kv.size(-2)} tokens")
        x = self.embedding[token].float()
        attended = torch.empty(round_up(rows, BLOCK), config.n_heads * config.head_dim, dtype=self.dtype)
        where, sizes = (places, cache.where), (rows, cache.kv.size(-2), config.norm_eps)
        for (qkv, gains, behind), kv in zip(self.layers, cache.kv, strict=True):
            self.call("attend", self.project(x, qkv), *gains, *self.angles, *where, *kv, attended, *sizes)
            self.mlp(x, attended, *behind)
        cache.lengths += 1
        return self.logits(x)

    @torch.no_grad()
    def read(self, ids: Tensor, lens: list[int], last: Tensor) -> Tensor:
        """Read prompts as `model(ids, doc_lens=lens, logits_at=last, cache=cache)` does: logits (prompts, vocab)."""
        ids = F.pad(ids, (0, -ids.size(1) % BLOCK))
        config, layout, x = self.config, self.layout(ids, None, lens, self.cache), self.embedding[ids[0]].float()
        heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
        with torch.autocast("cpu", enabled=False):
            for index, (qkv, gains, behind) in enumerate(self.layers):
                *qk, v = self.project(x, qkv).view(1, len(x), -1, config.head_dim).split(heads, dim=2)
                qk = [rms_norm(part, gain, config.norm_eps) for part, gain in zip(qk, gains, strict=True)]
                q, k, v = (t.transpose(1, 2) for t in (*(apply_rope(t, layout.cos, layout.sin) for t in qk), v))
                self.cache.write(index, k, v, *layout.places)
                attended = layout.attend(q, k, v, layout.docs).transpose(1, 2).reshape(len(x), -1)
                if index == len(self.layers) - 1:  # behind it nobody asks for the other tokens
                    last = F.pad(last, (0, -len(last) % BLOCK))
                    x, attended = x[last], attended[last]
                self.mlp(x, attended, *behind)
        return self.logits(x)[: len(lens)]

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (R, dim) float32 -> queries, keys and values, side by side (R, heads of all three * head_dim)."""
        heads = self.config.n_heads + 2 * self.config.n_kv_heads
        out = torch.empty(len(x), heads * self.config.head_dim, dtype=self.dtype)
        self.call("project", x, weight, out, *x.shape, out.size(1), self.config.norm_eps)
        return out

    def logits(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), self.config.vocab_size)
        self.call("project_to_floats", x, self.head, out, *x.shape, out.size(1), self.config.norm_eps)
        return out

    def mlp(self, x: Tensor, attended: Tensor, *weights: Tensor) -> None:
        """x (R, dim) += out(attended), and then += its MLP."""
        sizes = len(x), attended.size(1), x.size(1), self.config.hidden_dim
        self.call("mlp", x, attended, *weights, *sizes, self.config.norm_eps)

    def call(self, name: str, *args: Tensor | int | float | None) -> None:
        """A function of cpu_decoder.cpp."""
        native.call(getattr(self.kernels, name), *args)
