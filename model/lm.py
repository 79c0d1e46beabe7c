"""MiniMindLM: a small decoder-only language model, dense or mixture of experts, in one file.

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, tied embeddings: architecture, parameter names
and logits are those of transformers' `Qwen3ForCausalLM` and (without shared experts) `Qwen3MoeForCausalLM`.

Training passes documents one behind the other in one row, with their lengths in `doc_lens`; attention runs inside each
document only. Generation passes a batch with left padding and a KV cache.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Documents, Layout, document_attention, documents
from model.grouped import Dispatch, few_products, grouped_linear
from model.ops import (
    Linear,
    add_and_norm,
    apply_rope,
    length_step,
    linear_cross_entropy,
    recomputed,
    rms_norm,
    round_up,
    swiglu,
    uncompiled,
)
from model.sampling import KVCache, complete, sampler


@dataclass
class LMConfig:
    """Shape of the model, saved as JSON beside the weights. ValueError: sizes that do not fit together."""

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int | None = None  # default: dim / n_heads
    vocab_size: int = 6400
    hidden_dim: int | None = None  # inner width of SwiGLU; default: 8/3 dim, rounded up to a multiple of 64
    max_seq_len: int = 512  # longest context in tokens
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dropout: float = 0.0  # on the output of every attention and MLP, in training only
    use_moe: bool = False
    n_experts: int = 4  # routed experts per layer
    n_experts_per_tok: int = 2  # routed experts that a token visits
    n_shared_experts: int = 0  # experts that every token visits; with 0 the model is a Qwen3-MoE
    moe_hidden_dim: int | None = None  # inner width of one expert; default: hidden_dim / n_experts_per_tok, rounded up
    norm_topk_prob: bool = True  # rescale the weights of the chosen experts to sum 1
    aux_loss_alpha: float = 0.01  # weight of the load-balancing loss

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}: change one of them")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        self.hidden_dim = self.hidden_dim or 64 * math.ceil(self.dim * 8 / 3 / 64)
        self.moe_hidden_dim = self.moe_hidden_dim or 8 * math.ceil(self.hidden_dim / max(1, self.n_experts_per_tok) / 8)
        if self.use_moe and not 1 <= self.n_experts_per_tok <= self.n_experts:
            raise ValueError(f"n_experts_per_tok {self.n_experts_per_tok} must lie in 1..{self.n_experts} (n_experts)")
        if self.use_moe and (self.dim % 8 or self.moe_hidden_dim % 8):  # what grouped_mm takes
            raise ValueError(f"dim {self.dim} and moe_hidden_dim {self.moe_hidden_dim} must be multiples of 8 with MoE")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_flags(cls, flags: dict, vocab_size: int) -> "LMConfig":
        """The shape that a stage script's flags describe."""
        flags = {**flags, "use_moe": bool(flags["use_moe"]), "vocab_size": vocab_size}
        return cls(**{field.name: flags[field.name] for field in fields(cls) if field.name in flags})

    @classmethod
    def from_json(cls, path: str | Path) -> "LMConfig":
        """Read the JSON that stands beside a weights file. ValueError: it is not one of ours; names the file."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a model configuration ({error})") from None


class LMOutput(NamedTuple):  # a tuple: DDP, FSDP and DeepSpeed look for tensors in those
    logits: Tensor | None  # (B, T, vocab), or (K, vocab) when logits_at was given; None when targets were
    aux_loss: Tensor  # scalar float32: aux_loss_alpha x load-balancing loss; 0 for a dense model
    loss: Tensor | None = None  # scalar float32: cross-entropy summed over the targets


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # cast once: the projections that follow would each cast the same again
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(RMSNorm):  # of the stream x with what a branch of it returned; returns both, for the next branch
    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_and_norm(x, branch, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and RMSNorm on queries and keys.

    Source: Ainslie et al., GQA (2023); Henry et al., Query-Key Normalization (2020).
    """

    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.q_proj = Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q, k = self.q_norm(self.q_proj(x).view(heads)), self.k_norm(self.k_proj(x).view(heads))
        q, k = apply_rope(q, layout.cos, layout.sin), apply_rope(k, layout.cos, layout.sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, self.v_proj(x).view(heads)))  # (B, H, T, D), k, v (B, H_kv, T, D)
        if layout.cache is not None:
            layout.cache.write(self.index, k, v, *layout.places)
            k, v = (k, v) if layout.attend is not None else layout.cache.read(self.index)
        if layout.attend is not None:
            out = layout.attend(q, k, v, layout.docs)
        else:  # a new token sees every key: not causal in the sense of the kernel, which aligns at the first key
            causal = layout.mask is None and T > 1
            q = q.view(B, k.size(1), -1, self.head_dim) if T == 1 else q  # a group of heads as queries of one head
            out = F.scaled_dot_product_attention(q, k, v, layout.mask, is_causal=causal, enable_gqa=T > 1)
            out = out.reshape(B, -1, T, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """The dense MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=False)
        self.up_proj = Linear(dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """The routed experts of a layer, each a SwiGLU, their weights stacked: one grouped product instead of a loop."""

    def __init__(self, n: int, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n, dim, hidden_dim))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, dim) sorted by expert; ends (n,) int32: where each expert's rows end. Returns (M, dim)."""
        gate, up = grouped_linear(x, self.gate_up_proj, ends, parts=2)
        return grouped_linear(swiglu(gate, up), self.down_proj, ends)[0]


class Router(nn.Linear):
    """x (N, dim) -> probabilities (N, experts) in float32: a routing decision in low precision is a coin toss."""

    def forward(self, x: Tensor) -> Tensor:
        return few_products(x, self.weight).softmax(dim=-1)


class MoE(nn.Module):
    """Top-k routing over experts, plus optional shared experts that see every token. No token is ever dropped.

    The load-balancing loss is taken per document and averaged over documents by their tokens. Taken over whatever
    shares a batch it would change with the batch's layout; per document it is a sum over documents, like the
    cross-entropy, so any split into micro-batches and ranks gives the same gradient.

    Source: Fedus et al., Switch Transformers (2021), eq. 4-6, n_experts * sum_e f_e P_e, with the scope of a sequence
    as in DeepSeek-V2 (2024), eq. 23-25. It is 1 when the routing is even.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.gate = Router(config.dim, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, config.dim, config.moe_hidden_dim)
        if config.n_shared_experts:
            self.shared_expert = SwiGLU(config.dim, config.moe_hidden_dim * config.n_shared_experts)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.size(-1))  # (N, dim)
        rows, ends, row, weight, aux_loss = self.route(flat, layout)
        out = self.collect(self.experts(rows, ends), row, weight)
        if self.config.n_shared_experts:
            out = out + self.shared_expert(flat)
        return out.view_as(x), aux_loss

    @uncompiled  # how many rows an expert has is in the data
    def route(self, flat: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """The rows of flat (N, dim) sorted by expert (M, dim), where each expert's end (E,), where those of each token
        are (N * k,), their weights (N, k), and the balance loss."""
        top_k, n_experts = self.config.n_experts_per_tok, self.config.n_experts
        probs = self.gate(flat)  # (N, E)
        weight, choice = probs.topk(top_k, dim=-1)  # (N, k)
        if self.config.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        # The rows of an expert are filled up to a multiple of 16: a product of few rows is rounded in another way (MKL:
        # fewer than 4 a thread), so the routing of one document would change its neighbours' logits by 1e-6.
        packed, n_rows = layout.attend is not None, top_k * len(flat)
        block = max(16, 4 * length_step(n_rows // n_experts, self.experts.down_proj)) if packed else 1
        visit = choice.flatten() == torch.arange(n_experts, device=flat.device).unsqueeze(1)  # (E, N * k)
        count = visit.sum(dim=1)
        size = round_up(count, block)  # (E,)
        ends = size.cumsum(dim=0)
        row = visit.flatten().cumsum(dim=0).view_as(visit) - 1  # among all rows, before any are filled up
        row = ((row + (ends - size - count.cumsum(dim=0) + count).unsqueeze(1)) * visit).sum(dim=0)  # (N * k,)
        if flat.device.type == "cpu":
            n_rows = int(ends[-1])
        else:  # a shape that is known beforehand: a GPU would have to be waited for
            n_rows = round_up(n_rows + n_experts * (block - 1), block)
            ends[-1:].fill_(n_rows)
        token = row.new_zeros(n_rows).index_copy_(0, row, torch.arange(len(row), device=row.device) // top_k)
        return Dispatch.apply(flat, token, row), ends.int(), row, weight, self.balance_loss(probs, choice, layout)

    def collect(self, out: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        """The experts' out (M, dim) -> (N, dim)."""
        out = out.index_select(0, row)  # (N * k, dim)
        if weight.size(1) > 1 or not self.config.norm_topk_prob:  # the weight of a single expert was rescaled to 1
            out = (out.view(*weight.shape, -1) * weight.unsqueeze(-1).to(out.dtype)).sum(dim=1)
        return out

    def balance_loss(self, probs: Tensor, choice: Tensor, layout: Layout) -> Tensor:
        if layout.doc_of is None:
            return probs.new_zeros(())
        n_experts = probs.size(1)
        visits = F.one_hot(choice, n_experts).sum(dim=1) / choice.size(1)
        values = torch.cat((torch.ones_like(probs[:, :1]), visits, probs), dim=1)  # (N, 1 + 2 E)
        sums = values.new_zeros(len(layout.docs.lens), values.size(1)).index_add(0, layout.doc_of, values)[:-1]
        tokens, chosen, given = sums.split((1, n_experts, n_experts), dim=1)
        tokens, chosen = tokens.detach(), chosen.detach()
        if layout.context is not None:
            tokens, chosen = layout.context.total(tokens), layout.context.total(chosen)
        loss = n_experts * chosen * given / tokens.clamp_min(1.0)  # (docs, E), summed over E: loss x tokens
        return self.config.aux_loss_alpha * loss.sum() / tokens.sum().clamp_min(1.0)


class Block(nn.Module):
    def __init__(self, config: LMConfig, index: int):
        super().__init__()
        self.dropout, self.use_moe = config.dropout, config.use_moe
        self.input_layernorm = ResidualNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = ResidualNorm(config.dim, config.norm_eps)
        self.mlp = MoE(config) if config.use_moe else SwiGLU(config.dim, config.hidden_dim)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        x, h = self.input_layernorm(x)
        x, h = self.post_attention_layernorm(x, F.dropout(self.self_attn(h, layout), self.dropout, self.training))
        out, aux_loss = self.mlp(h, layout) if self.use_moe else (self.mlp(h), h.new_zeros((), dtype=torch.float32))
        return x + F.dropout(out, self.dropout, self.training), aux_loss


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model, whatever stands on or beside them: a head for rewards, a second model."""
    return [module for module in model.modules() if isinstance(module, Block)]


class Head(Linear):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of x (K, dim), or their summed cross-entropy with targets (K,)."""
        return super().forward(x) if targets is None else linear_cross_entropy(x, self.weight, targets)


class Decoder(nn.Module):  # all below the head
    def __init__(self, config: LMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class MiniMindLM(nn.Module):
    def __init__(self, config: LMConfig, gradient_checkpointing: int = 0):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing  # the level of `recomputed`, for memory
        self.context = None  # runtime/context_parallel.py sets it where processes share a row
        self.model = Decoder(config)
        self.lm_head = Head(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():  # GPT-2's initialisation: residual outputs shrink with depth
            if p.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        doc_lens: list[int] | None = None,
        logits_at: Tensor | None = None,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
        layout: Layout | None = None,
    ) -> LMOutput:
        """Next-token logits, or the loss without them.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) 0/1, with a cache (B, held + T); 0 marks padding, on either side.
            doc_lens: lengths of the documents packed into the one row (B = 1); tokens behind them are padding.
            logits_at: (K,) int64, positions in the flattened (B * T); the head runs on these alone.
            cache: keys and values of the tokens before input_ids, row by row; is extended. Documents of a packed row
                are prompts: each goes to rows of its own, see `KVCache.filled`.
            targets: (K,) int64, the tokens that follow at logits_at.
            layout: what else would be worked out from attention_mask, doc_lens and cache.

        Raises:
            ValueError: a document or context longer than max_seq_len; a token id outside the vocabulary.
        """
        T = input_ids.size(1)
        if doc_lens is not None and self.context is None:
            input_ids = F.pad(input_ids, (0, round_up(T, length_step(T, self.model.embed_tokens.weight)) - T))
        layout = layout or self.layout(input_ids, attention_mask, doc_lens, cache)
        x = self.model.embed_tokens(input_ids)  # (B, T, dim)
        aux_losses = []
        for block in self.model.layers:
            x, aux_loss = recomputed(self.gradient_checkpointing, block, x, layout)
            aux_losses.append(aux_loss)
        x = x[:, :T]
        if logits_at is not None:
            x = x.reshape(-1, x.size(-1)).index_select(0, logits_at)  # (K, dim), before the norm: it works row by row
        x, aux_loss = self.model.norm(x), torch.stack(aux_losses).mean()
        logits, loss = (self.lm_head(x), None) if targets is None else (None, self.lm_head(x, targets))
        return LMOutput(logits, aux_loss, loss)

    @uncompiled  # reads lengths and ids on the host
    def layout(
        self, input_ids: Tensor, attention_mask: Tensor | None, doc_lens: list[int] | None, cache: KVCache | None
    ) -> Layout:
        """Positions, masks and document borders of one forward pass; checks what the caller passed."""
        (B, T), device, config = input_ids.shape, input_ids.device, self.config
        held = 0 if cache is None or doc_lens is not None else int(cache.lengths.max())
        longest = held + T if doc_lens is None else max(doc_lens, default=0)
        if longest > config.max_seq_len:
            raise ValueError(f"context of {longest} tokens is longer than max_seq_len {config.max_seq_len}")
        row = T if self.context is None else T * self.context.size
        if doc_lens is not None and (B != 1 or sum(doc_lens) > row):
            raise ValueError(f"doc_lens must fit the {row} tokens of one row; they sum to {sum(doc_lens)}, rows: {B}")
        # Reading ids back from a GPU waits for it: in training the ids come from our own tokenizer.
        if (device.type == "cpu" or not self.training) and input_ids.numel():
            low, high = (int(v) for v in input_ids.aminmax())
            if low < 0 or high >= config.vocab_size:
                raise ValueError(f"token ids {low} to {high} do not fit a vocabulary of {config.vocab_size} entries")

        mask = doc_of = places = attend = None
        lens = [T] * B if doc_lens is None else doc_lens
        lens = torch.tensor([*lens, B * row - sum(lens)])  # on the CPU, as is what is made of it: no waiting for a GPU
        part = slice(None) if self.context is None else self.context.part(row)  # what this process holds of the row
        if doc_lens is not None:
            position = torch.cat([torch.arange(n) for n in lens])[part].unsqueeze(0)
        elif attention_mask is not None:
            position = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
            key, query = torch.arange(T, device=device), torch.arange(T, device=device).view(T, 1)
            # Padding sees itself alone: a row without any key would be NaN.
            mask = (key <= query) & attention_mask.bool().view(B, 1, 1, -1) | (key == query)
        else:
            position = torch.arange(T).expand(B, T) + (0 if cache is None else cache.lengths.unsqueeze(1))
        if cache is not None:
            if doc_lens is not None:
                rows = cache.filled.repeat_interleave(lens[:-1], dim=1)  # (copies, T)
                cache.lengths[cache.filled] = lens[:-1]
            else:
                rows = torch.arange(B).repeat_interleave(T)
                if held and (T > 1 or cache.lengths.min() < held):  # to be added: each layer would convert a bool
                    hidden = torch.arange(held + T) > position.view(B, 1, T, 1)
                    mask = torch.zeros(hidden.shape, dtype=cache.kv.dtype).masked_fill_(hidden, -math.inf).to(device)
                cache.lengths += T
                cache.longest = held + T
            places = rows.to(device), position.flatten()[: rows.size(-1)].to(device)
        if config.use_moe and cache is None:
            doc_of = torch.arange(len(lens)).repeat_interleave(lens)[part].to(device)
            if attention_mask is not None:
                doc_of = doc_of.where(attention_mask.flatten().bool(), len(lens) - 1)
        docs = Documents(lens) if doc_lens is None else documents(lens, device)
        if doc_lens is not None:
            attend = document_attention if self.context is None else self.context.attend
        return Layout(*self.rotation(position.to(device)), docs, attend, mask, doc_of, cache, places, self.context)

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position (B, T) -> cosine and sine of the angles of its pairs, (B, T, 1, head_dim / 2) float32."""
        size = self.config.head_dim
        frequency = 1.0 / self.config.rope_theta ** (torch.arange(0, size, 2, device=position.device) / size)
        angle = position[:, :, None, None].float() * frequency
        return angle.cos(), angle.sin()

    def stream(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 512,
        eos_token_id: int | None = None, **sampling,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Generate token by token with a KV cache.

        Args:
            input_ids: (B, T) int64, prompts of unequal length padded on the left.
            attention_mask: (B, T) 0/1, needed where there is padding.
            max_new_tokens: at most so many; generation also ends when the context is full.
            eos_token_id: ends a row; a row that has ended yields eos until all have.
            temperature: 0 (default) takes the most probable token, else logits are divided by it and sampled.
            top_k, top_p: sample among the k most probable tokens / the smallest set of probability >= p; 0 and 1: off.
            repetition_penalty: > 1 lowers the logits of tokens already in the context; 1: off.
            generator: torch.Generator.

        Yields: (B,) int64, the next token of every row.
        """
        B, T = input_ids.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"prompt of {T} tokens is longer than max_seq_len {self.config.max_seq_len}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
        limits = [min(max_new_tokens, self.config.max_seq_len - T)] * B
        choose = sampler(prompts, self.config.vocab_size, input_ids.device, **sampling)
        for row, _, token in complete(self, prompts, limits, choose, eos_token_id, batch_size=B):
            tokens = input_ids.new_full((B,), 0 if eos_token_id is None else eos_token_id)
            tokens[row] = token
            yield tokens

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **sampling) -> Tensor:
        """The tokens of `stream` (same arguments) as one tensor (B, new) int64."""
        tokens = list(self.stream(input_ids, attention_mask, **sampling))
        return torch.stack(tokens, dim=1) if tokens else input_ids.new_zeros(input_ids.size(0), 0)
