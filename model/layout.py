"""Layout: what one forward pass knows of its tokens besides their ids, the same in all layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Layout:
    """Positions, masks and document borders of B rows of T tokens.

    A packed row (B = 1) holds documents one behind the other; padding behind them counts as one
    more document. Without packing each row is a document of its own.
    """

    cos: Tensor  # (B, T, 1, head_dim / 2) float32, of the rotary angle at each token's position
    sin: Tensor
    doc_lens: Tensor | None = None  # (docs + 1,) int64 on the host: lengths in a packed row
    cu_seqlens: Tensor | None = None  # (docs + 2,) int32: where these documents begin and end
    max_seqlen: int = 0  # the longest of them
    mask: Tensor | None = None  # (B, 1, T, S) bool: which keys a query sees; None: all up to itself
    doc_ids: Tensor | None = None  # (B * T,) int64: each token's document; `docs` for padding
    docs: int = 0
    cache: object | None = None  # a kv_cache.KVCache
    slots: tuple[Tensor, Tensor] | None = None  # row and position in the cache, of each token
    context: object | None = None  # set where processes share the row and each holds a part of it


def rotary_angles(config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, T) -> cosine and sine of RoPE's angles, (B, T, 1, head_dim / 2) float32."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    scale = 1.0
    if config.rope_scaling:
        from model.rope import scaled_frequencies

        frequency, scale = scaled_frequencies(config, positions.device)
    angle = positions[:, :, None, None].float() * frequency
    return angle.cos() * scale, angle.sin() * scale


def check_length(config, tokens: int) -> None:
    """ValueError: a context that is too long."""
    if tokens > config.max_seq_len:
        limit = f"max_seq_len {config.max_seq_len}"
        raise ValueError(f"context of {tokens} tokens is longer than {limit}")


def make_layout(
    config,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    doc_lens: list[int] | None = None,
) -> Layout:
    """The layout of a forward pass; for the arguments see `MiniMindLM.forward`.

    Lengths and positions are worked out on the host and sent to the device, which nobody waits for.

    Raises:
        ValueError: a context that is too long, or documents that do not fit their row.
    """
    (B, T), device = input_ids.shape, input_ids.device
    check_length(config, T if doc_lens is None else max(doc_lens, default=0))
    if doc_lens is not None and (B != 1 or sum(doc_lens) > T):
        fit = f"they sum to {sum(doc_lens)}, rows: {B}"
        raise ValueError(f"doc_lens must fit the {T} tokens of one row; {fit}")
    lens = [T] * B if doc_lens is None else doc_lens
    lens = torch.tensor([*lens, B * T - sum(lens)])  # (docs + 1,), padding is the last one
    mask = None
    positions = torch.arange(T).expand(B, T)
    if doc_lens is not None:
        positions = torch.cat([torch.arange(n) for n in lens]).unsqueeze(0)
    elif attention_mask is not None:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        key, query = torch.arange(T, device=device), torch.arange(T, device=device).view(T, 1)
        seen = (key <= query) & attention_mask.bool().view(B, 1, 1, -1)
        mask = seen | (key == query)  # padding sees itself: a row without a key would be NaN

    layout = Layout(*rotary_angles(config, positions.to(device)), mask=mask, docs=len(lens) - 1)
    if doc_lens is not None:
        layout.doc_lens, layout.max_seqlen = lens, int(lens.max())
        cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).int()
        layout.cu_seqlens = cu_seqlens.to(device)
    if config.use_moe:  # for the load-balancing loss
        layout.doc_ids = torch.arange(len(lens)).repeat_interleave(lens).to(device)
        if attention_mask is not None:
            layout.doc_ids = layout.doc_ids.where(attention_mask.flatten().bool(), layout.docs)
    return layout
