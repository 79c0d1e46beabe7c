"""One more token for each row of a batch, on a CPU: the forward pass of lm.py, written for few rows and many steps.

There is so little to compute in such a step that the number of operations and of passes over the weights decides. So
matrices that read the same vector are joined, weights are cast once for all steps, the gains of the norms are part of
the matrices behind them, and activations have a column for each row of the batch: a product then reads every weight
once and leaves its result as the next one wants it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import Linear, rotate

GROUP = 16  # rows that attend together, up to the longest of them
MOST = 2**30  # bytes of weights: of more there should be no second copy


def suits(model, dtype: torch.dtype) -> bool:
    """Whether a model is one that `FewRows` knows: dense, on a CPU, its layers plain ones (not LoRA's, not sharded)."""
    layers = [module for block in model.model.layers for module in (*block.self_attn.children(), *block.mlp.children())]
    plain = all(type(layer) is Linear for layer in layers if not hasattr(layer, "eps"))  # what has one is a norm
    plain = plain and not model.config.use_moe and type(model.lm_head.weight) is torch.nn.Parameter
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return plain and model.lm_head.weight.device.type == "cpu" and size <= MOST


class FewRows:
    """Calls as `model(token.unsqueeze(1), cache=cache)` does it: the same logits but for rounding.

    Args:
        model: a MiniMindLM that `suits`.
        cache: a KVCache, whose dtype is that of the products.
    """

    def __init__(self, model, cache):
        self.config, self.cache, self.dtype = model.config, cache, cache.kv.dtype
        self.embedding, self.head = model.model.embed_tokens.weight, self.joined(model.model.norm, model.lm_head)
        self.layers = []
        for block in model.model.layers:
            attention, mlp, n_kv = block.self_attn, block.mlp, self.config.n_kv_heads
            qkv = self.joined(block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = self.joined(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            gains = [norm.weight.float().expand(n, -1) for norm, n in
                     ((attention.q_norm, self.config.n_heads), (attention.k_norm, n_kv))]  # fmt: skip
            out, down = (layer.weight.to(self.dtype) for layer in (attention.o_proj, mlp.down_proj))
            self.layers.append((qkv, torch.cat(gains).unsqueeze(2), out, gate_up, down))
        frequency = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angle = torch.arange(cache.kv.size(-2)) / self.config.rope_theta ** frequency.unsqueeze(1)
        self.cos, self.sin = angle.cos(), angle.sin()  # (D / 2, capacity)

    def joined(self, norm, *layers) -> Tensor:
        return (torch.cat([layer.weight for layer in layers]) * norm.weight).to(self.dtype)

    def scale(self, x: Tensor, dim: int) -> Tensor:
        """1 / rms(x) over a dimension; the gain of a norm is part of the matrix behind it."""
        return x.square().sum(dim, keepdim=True).div_(x.size(dim)).add_(self.config.norm_eps).rsqrt_()

    def __call__(self, token: Tensor) -> Tensor:
        """token (R,) int64, R being the rows of the cache -> logits (R, vocab) float32."""
        with torch.autocast("cpu", enabled=False):
            return self.step(token)

    def step(self, token: Tensor) -> Tensor:
        config, cache, R = self.config, self.cache, len(token)
        H, KV, D, capacity = config.n_heads, config.n_kv_heads, config.head_dim, cache.kv.size(-2)
        cos, sin = self.cos[:, cache.lengths], self.sin[:, cache.lengths]  # (D / 2, R)
        place = (torch.arange(2 * R * KV) * capacity).view(2, R, KV) + cache.lengths.unsqueeze(1)
        place = place.transpose(0, 1).flatten()  # of the new key and value of each row, among all of a layer
        cache.lengths += 1
        groups = []
        for rows, lens in zip(cache.kv.split(GROUP, dim=2), cache.lengths.split(GROUP), strict=True):
            most = int(lens.max())
            hidden, mask = torch.arange(most) >= lens.view(-1, 1, 1, 1), None
            if hidden.any():
                mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -math.inf)
            groups.append((rows[..., :most, :].flatten(0, 1).unbind(0), mask))

        x = self.embedding[token].T.float().contiguous()  # (dim, R)
        for layer, (qkv, gains, out, gate_up, down) in enumerate(self.layers):
            heads = (qkv @ (x * self.scale(x, 0)).to(self.dtype)).view(H + 2 * KV, D, R).float()
            qk = heads[: H + KV]
            qk.copy_(rotate(qk.mul_(self.scale(qk, 1)).mul_(gains), cos, sin, dim=1))
            heads = torch.empty(R, H + 2 * KV, D, dtype=self.dtype).copy_(heads.permute(2, 0, 1))
            cache.kv[layer].view(-1, D).index_copy_(0, place, heads[:, H:].reshape(-1, D))
            queries = heads[:, :H].unflatten(1, (KV, -1)).split(GROUP)  # a group of heads as queries of one head
            parts = [
                F.scaled_dot_product_attention(q, held[2 * layer], held[2 * layer + 1], mask)
                for q, (held, mask) in zip(queries, groups, strict=True)
            ]
            x += out @ torch.cat(parts).view(R, H * D).T
            gate, up = (gate_up @ (x * self.scale(x, 0)).to(self.dtype)).chunk(2)
            x += down @ F.silu(gate).mul_(up)
        return ((x * self.scale(x, 0)).to(self.dtype).T @ self.head.T).float()
