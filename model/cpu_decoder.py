"""Generation on a CPU: the forward pass of lm.py without gradients, with weights prepared once for all its steps.

There is so little to compute in a step that reading the weights, the number of operations and of passes over memory
decide. So matrices that read the same vector are joined, the gains of the norms are part of the matrices behind them,
weights are cast and laid out once, as oneDNN reads them, and what stands between the products is compiled from
cpu_decoder.cpp.
"""

import ctypes
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import native
from model.ops import Linear, apply_rope, rms_norm, round_up

MOST = 2**30  # bytes of weights: of more there should be no second copy
ROWS = 4  # numbers of rows are multiples of it: products are prepared by their shape, 4 ms for each new number


def suits(model, dtype: torch.dtype) -> bool:
    """Whether a model is one that `CpuDecoder` knows: dense, on a CPU, its layers plain ones (no LoRA, not sharded)."""
    layers = [module for block in model.model.layers for module in (*block.self_attn.children(), *block.mlp.children())]
    plain = all(type(layer) is Linear for layer in layers if not hasattr(layer, "eps"))  # what has one is a norm
    plain = plain and not model.config.use_moe and type(model.lm_head.weight) is torch.nn.Parameter
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if not plain or model.lm_head.weight.device.type != "cpu" or size > MOST:
        return False
    wide = lanes(model.config)
    return not (model.config.dim % wide or model.config.hidden_dim % wide) and kernels(model.config, dtype) is not None


def lanes(config) -> int:
    """Numbers in a vector: of 512 bits, or what half a head has room for."""
    return math.gcd(config.head_dim // 2, 16)


def kernels(config, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of cpu_decoder.cpp for a shape of attention; None: there is no compiler, or none that can."""
    shape = {"DIM": config.head_dim, "KV": config.n_kv_heads, "GROUP": config.n_heads // config.n_kv_heads}
    return native.library("cpu_decoder.cpp", dtype, LANES=lanes(config), **shape)


def packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes x into x @ weight.T, both of one dtype: with the weight laid out as oneDNN reads it, where it can."""
    here = torch.backends.mkldnn.is_available()
    if not here or weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return functools.partial(F.linear, weight=weight)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


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
        self.embedding, self.head = model.model.embed_tokens.weight, self.joined(model.model.norm, model.lm_head)
        self.layers = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = self.joined(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            gains = [norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm)]
            gate_up = self.joined(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            out, down = (packed(layer.weight.to(self.dtype)) for layer in (attention.o_proj, mlp.down_proj))
            self.layers.append((qkv, gains, out, gate_up, down))
        positions = torch.arange(cache.kv.size(-2)).unsqueeze(0)
        self.angles = [part.view(-1, self.config.head_dim // 2) for part in model.rotation(positions)]

    def joined(self, norm, *layers) -> Callable[[Tensor], Tensor]:
        return packed((torch.cat([layer.weight for layer in layers]) * norm.weight).to(self.dtype))

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """token (R,) int64, R being the rows of the cache -> logits (R, vocab) float32. ValueError: a row is full."""
        config, cache, places = self.config, self.cache, self.cache.lengths.clone()
        if int(places.max()) >= cache.kv.size(-2):
            raise ValueError(f"a row of the cache is full: it has room for {cache.kv.size(-2)} tokens")
        x, by = torch.zeros(round_up(len(token), ROWS), config.dim), None
        x[: len(token)] = self.embedding[token]
        attended = torch.zeros(len(x), config.n_heads * config.head_dim, dtype=self.dtype)
        where, sizes = (places, cache.where), (len(token), cache.kv.size(-2), config.norm_eps)
        with torch.autocast("cpu", enabled=False):
            for (qkv, gains, *behind), kv in zip(self.layers, cache.kv, strict=True):
                self.call("attend", qkv(self.normed(x, by)), *gains, *self.angles, *where, *kv, attended, *sizes)
                by = self.mlp(x, attended, *behind)
            cache.lengths += 1
            return self.head(self.normed(x, by))[: len(token)].float()

    @torch.no_grad()
    def read(self, ids: Tensor, lens: list[int], last: Tensor) -> Tensor:
        """Read prompts as `model(ids, doc_lens=lens, logits_at=last, cache=cache)` does: logits (prompts, vocab)."""
        config, layout = self.config, self.layout(ids, None, lens, self.cache)
        x, by = self.embedding[ids[0]].float(), None
        heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
        with torch.autocast("cpu", enabled=False):
            for index, (qkv, gains, *behind) in enumerate(self.layers):
                *qk, v = qkv(self.normed(x, by)).view(1, len(x), -1, config.head_dim).split(heads, dim=2)
                qk = [rms_norm(part, gain, config.norm_eps) for part, gain in zip(qk, gains, strict=True)]
                q, k, v = (t.transpose(1, 2) for t in (*(apply_rope(t, layout.cos, layout.sin) for t in qk), v))
                self.cache.write(index, k, v, *layout.places)
                attended = layout.attend(q, k, v, layout.docs).transpose(1, 2).reshape(len(x), -1)
                if index == len(self.layers) - 1:  # behind it nobody asks for the other tokens
                    x, attended = x[last], attended[last]
                by = self.mlp(x, attended, *behind)
            return self.head(self.normed(x, by)).float()

    def normed(self, x: Tensor, by: Tensor | None) -> Tensor:
        """x += by; returns x over its root mean square."""
        out = torch.empty(x.shape, dtype=self.dtype)
        self.call("add_and_norm", x, by, out, *x.shape, self.config.norm_eps)
        return out

    def mlp(self, x: Tensor, attended: Tensor, out: Callable, gate_up: Callable, down: Callable) -> Tensor:
        """x += out(attended); returns what the MLP makes of x."""
        inner = torch.empty(len(x), self.config.hidden_dim, dtype=self.dtype)
        self.call("swiglu", gate_up(self.normed(x, out(attended))), inner, *inner.shape)
        return down(inner)

    def call(self, name: str, *args: Tensor | int | float | None) -> None:
        """A function of cpu_decoder.cpp."""
        native.call(getattr(self.kernels, name), *args)
