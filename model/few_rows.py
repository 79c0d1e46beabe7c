"""One more token for each row of a batch, on a CPU: the forward pass of lm.py, written for few rows and many steps.

There is so little to compute in such a step that the number of operations and of passes over memory decides. So
matrices that read the same vector are joined, weights are cast once for all steps, the gains of the norms are part of
the matrices behind them, and what stands between the products is compiled from few_rows.cpp. Activations have a column
for each row of the batch: a product then reads every weight once and leaves its result as the next one wants it.
"""

import ctypes
import math

import torch
from torch import Tensor

from model import native
from model.ops import Linear, round_up

MOST = 2**30  # bytes of weights: of more there should be no second copy
COLUMNS = 16  # whole vectors of them; and a CPU prepares products by their shape, so few shapes are better


def suits(model, dtype: torch.dtype) -> bool:
    """Whether a model is one that `FewRows` knows: dense, on a CPU, its layers plain ones (not LoRA's, not sharded)."""
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
    """The functions of few_rows.cpp for a shape of attention; None: there is no compiler, or none that can."""
    shape = {"DIM": config.head_dim, "KV": config.n_kv_heads, "GROUP": config.n_heads // config.n_kv_heads}
    return native.library("few_rows.cpp", dtype, LANES=lanes(config), **shape)


class FewRows:
    """Calls as `model(token.unsqueeze(1), cache=cache)` does it: the same logits but for rounding.

    Args:
        model: a MiniMindLM that `suits`.
        cache: a KVCache, whose dtype is that of the products.
    """

    def __init__(self, model, cache):
        self.config, self.cache, self.dtype = model.config, cache, cache.kv.dtype
        self.kernels = kernels(self.config, self.dtype)
        self.embedding, self.head = model.model.embed_tokens.weight, self.joined(model.model.norm, model.lm_head)
        self.layers = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = self.joined(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            gains = [norm.weight.detach().float() for norm in (attention.q_norm, attention.k_norm)]
            gate_up = self.joined(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            out, down = (layer.weight.to(self.dtype) for layer in (attention.o_proj, mlp.down_proj))
            self.layers.append((qkv, gains, out, gate_up, down))
        positions = torch.arange(cache.kv.size(-2)).unsqueeze(0)
        self.angles = [part.view(-1, self.config.head_dim // 2) for part in model.rotation(positions)]

    def joined(self, norm, *layers) -> Tensor:
        return (torch.cat([layer.weight for layer in layers]) * norm.weight).to(self.dtype)

    def call(self, name: str, *args: Tensor | int | float | None) -> None:
        """A function of few_rows.cpp."""
        native.call(getattr(self.kernels, name), *args)

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """token (R,) int64, R being the rows of the cache -> logits (R, vocab) float32. ValueError: a row is full."""
        with torch.autocast("cpu", enabled=False):
            return self.step(token)

    def step(self, token: Tensor) -> Tensor:
        config, cache, R, eps = self.config, self.cache, len(token), self.config.norm_eps
        alone = R == 1 and self.dtype == torch.float32  # a product of one column has a kernel of its own there
        columns = 1 if alone else round_up(R, COLUMNS)
        x = torch.zeros(config.dim, columns)
        x[:, :R] = self.embedding[token].T
        normed = torch.empty(config.dim, columns, dtype=self.dtype)
        attended = torch.zeros(columns, config.n_heads * config.head_dim, dtype=self.dtype)
        inner = torch.empty(config.hidden_dim, columns, dtype=self.dtype)
        places, by = cache.lengths.clone(), None
        if int(places.max()) >= cache.kv.size(-2):
            raise ValueError(f"a row of the cache is full: it has room for {cache.kv.size(-2)} tokens")
        for (qkv, gains, out, gate_up, down), kv in zip(self.layers, cache.kv, strict=True):
            self.call("add_and_norm", x, by, normed, config.dim, columns, eps)
            qkv = qkv @ normed
            self.call("attend", qkv, *gains, *self.angles, places, *kv, attended, R, columns, kv.size(-2), eps)
            by = out @ attended.T
            self.call("add_and_norm", x, by, normed, config.dim, columns, eps)
            gate, up = (gate_up @ normed).chunk(2)
            self.call("swiglu", gate, up, inner, inner.numel())
            by = down @ inner
        self.call("add_and_norm", x, by, normed, config.dim, columns, eps)
        cache.lengths += 1
        return (normed.T @ self.head.T)[:R].float()
