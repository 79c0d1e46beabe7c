"""MiniMindLM: a small decoder-only language model, dense or mixture of experts, in plain PyTorch.

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, tied embeddings.
Architecture, parameter names and logits are those of transformers' `Qwen3ForCausalLM` and, without
shared experts, `Qwen3MoeForCausalLM`.

Shapes: B rows, T tokens, C = dim, D = head_dim, H query heads, H_kv KV heads, E experts.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import LMConfig
from model.layout import Layout, make_layout

MAX_LOGITS = 2**24  # numbers that exist at once: 64 MiB in float32


class LMOutput(NamedTuple):  # a tuple: DDP, FSDP and DeepSpeed look for tensors in those
    logits: Tensor | None  # (B, T, vocab), or (K, vocab) with logits_at; None with targets
    aux_loss: Tensor  # scalar float32: aux_loss_alpha x load-balancing loss; 0 for a dense model
    loss: Tensor | None = None  # scalar float32: cross-entropy summed over the targets


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), eq. 4.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, H, D) by the angle of their position.

    Source: Su et al., RoFormer (2021), eq. 34, in the half-split layout of Llama's and Qwen's
    weights.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def document_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside each document of a packed row; q (1, H, T, D) -> (1, H, T, D)."""
    lens = [n for n in layout.doc_lens.tolist() if n]
    documents = zip(q.split(lens, 2), k.split(lens, 2), v.split(lens, 2), strict=True)
    options = {"is_causal": True, "enable_gqa": True}
    outs = [F.scaled_dot_product_attention(*qkv, **options) for qkv in documents]
    return torch.cat(outs, dim=2)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and RMSNorm on queries and keys.

    Source: Ainslie et al., GQA (2023); Henry et al., Query-Key Normalization (2020).
    """

    apply_rope = staticmethod(apply_rope)
    document_attention = staticmethod(document_attention)

    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H_kv, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q = self.apply_rope(q, layout.cos, layout.sin)
        k = self.apply_rope(k, layout.cos, layout.sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if layout.cache is not None:
            k, v = layout.cache.update(self.index, k, v, layout)  # (B, H_kv, S, D)
        out = self.attend(q, k, v, layout)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Attend: q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D)."""
        if layout.doc_lens is not None:
            return self.attend_packed(q, k, v, layout)
        options = {"attn_mask": layout.mask, "enable_gqa": True}
        causal = layout.mask is None and q.size(2) > 1  # a single new token sees all keys
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if layout.context is not None:
            return layout.context.attend(self.document_attention, q, k, v, layout)
        return self.document_attention(q, k, v, layout)


class SwiGLU(nn.Module):
    """The dense MLP: down(silu(gate(x)) * up(x)).

    Source: Shazeer, GLU Variants Improve Transformer (2020), eq. 6.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_moe(config: LMConfig) -> nn.Module:
    """A mixture of experts, beside what every token visits."""
    from model.moe import MoE

    shared = config.n_shared_experts
    return MoE(config, SwiGLU(config.dim, config.moe_hidden_dim * shared) if shared else None)


class Block(nn.Module):
    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.dropout, self.use_moe = config.dropout, config.use_moe
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = make_moe(config) if config.use_moe else SwiGLU(config.dim, config.hidden_dim)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Of x (B, T, C) the output, (B, T, C), and the load-balancing loss."""
        x = x + self.drop(self.self_attn(self.input_layernorm(x), layout))
        out, aux_loss = self.feed_forward(self.post_attention_layernorm(x), layout)
        return x + self.drop(out), aux_loss

    def feed_forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        if self.use_moe:
            return self.mlp(x, layout)
        return self.mlp(x), x.new_zeros((), dtype=torch.float32)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model, whatever stands on or beside them: a reward head, a second model."""
    return [module for module in model.modules() if isinstance(module, Block)]


def chunk_size(vocab_size: int) -> int:
    """Tokens whose logits exist at once."""
    return max(64, MAX_LOGITS // vocab_size)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(x @ weight.T)[target], summed over tokens; a float32 scalar.

    Logits exist for a chunk of tokens at a time, and once more in the backward pass.

    Args:
        x: (K, C); K may be 0.
        weight: (vocab, C) of the head.
        targets: (K,) int64.
    """

    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    size = chunk_size(len(weight))
    chunks = zip(x.split(size), targets.split(size), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)


class Head(nn.Linear):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of x (K, C), or their summed cross-entropy with targets (K,)."""
        if targets is not None:
            return linear_cross_entropy(x, self.weight, targets)
        return super().forward(x)


def init_parameter(name: str, p: Tensor, n_layers: int) -> None:
    """Give a matrix its random values: as GPT-2, residual outputs shrink with depth.

    Vectors keep what they were built with, biases apart, which begin at zero.
    """
    if p.dim() > 1 or name.endswith("bias"):
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        std = 0.02 / math.sqrt(2 * n_layers) if residual else 0.02
        nn.init.normal_(p, std=std if p.dim() > 1 else 0.0)


class Decoder(nn.Module):  # all below the head
    def __init__(self, config: LMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class MiniMindLM(nn.Module):
    """The model with its head.

    Attributes:
        gradient_checkpointing: the level of `recompute.recompute`.
        context: set where processes share a row and each holds a part of its tokens.
        make_decoder: what generation takes instead of `kv_cache.Decoder`, where it is set.
    """

    def __init__(self, config: LMConfig, gradient_checkpointing: int = 0):
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        self.context = None
        self.make_decoder = None
        self.model = Decoder(config)
        self.lm_head = Head(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            init_parameter(name, p, config.n_layers)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        doc_lens: list[int] | None = None,
        logits_at: Tensor | None = None,
        cache=None,
        targets: Tensor | None = None,
        layout: Layout | None = None,
    ) -> LMOutput:
        """Next-token logits, or the loss without them.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) 0/1; 0 marks padding, on either side.
            doc_lens: lengths of the documents packed into the one row (B = 1), padding behind them.
                Attention runs inside each document only.
            logits_at: (K,) int64, positions in the flattened (B * T); the head runs on these alone.
            cache: a kv_cache.KVCache with keys and values of the tokens before; is extended.
            targets: (K,) int64, the tokens that follow at logits_at.
            layout: what else is worked out from attention_mask, doc_lens and cache.

        Raises:
            ValueError: a context longer than max_seq_len; outside of training an unknown token id.
        """
        layout = layout or self.layout(input_ids, attention_mask, doc_lens, cache)
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        aux_losses = []
        for block in self.model.layers:
            x, aux_loss = self.run_block(block, x, layout)
            aux_losses.append(aux_loss)
        if logits_at is not None:
            x = x.flatten(0, 1).index_select(0, logits_at)  # (K, C)
        x, aux_loss = self.model.norm(x), torch.stack(aux_losses).mean()
        if targets is not None:
            return LMOutput(None, aux_loss, self.lm_head(x, targets))
        return LMOutput(self.lm_head(x), aux_loss)

    def run_block(self, block: Block, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        if not self.gradient_checkpointing or not block.training:
            return block(x, layout)
        from model.recompute import recompute

        return recompute(self.gradient_checkpointing, block, x, layout)

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        doc_lens: list[int] | None = None,
        cache=None,
    ) -> Layout:
        """Positions, masks and document borders of a forward pass; checks the arguments."""
        if not self.training and input_ids.numel():  # training ids come from our own tokenizer
            low, high = (int(end) for end in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                entries = f"a vocabulary of {self.config.vocab_size} entries"
                raise ValueError(f"token ids {low} to {high} do not fit {entries}")
        if cache is not None:
            return cache.layout(self.config, input_ids, doc_lens)
        if self.context is not None:
            return self.context.layout(self.config, input_ids, doc_lens)
        return make_layout(self.config, input_ids, attention_mask, doc_lens)

    def stream(self, input_ids: Tensor, *args, **options) -> Iterator[Tensor]:
        """Generate token by token; see `generate.stream` for the arguments."""
        from model.generate import stream

        return stream(self, input_ids, *args, **options)

    def generate(self, input_ids: Tensor, *args, **options) -> Tensor:
        """The tokens of `stream` (same arguments) as one tensor (B, new) int64."""
        tokens = list(self.stream(input_ids, *args, **options))
        return torch.stack(tokens, dim=1) if tokens else input_ids.new_zeros(len(input_ids), 0)
