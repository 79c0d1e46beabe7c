"""KVCache: the keys and values of the tokens before, and the forward passes that go on from them."""

import torch
from torch import Tensor

from model.layout import Layout, check_length, make_layout, rotary_angles


class KVCache:
    """Keys and values of all layers, preallocated.

    Attributes:
        kv: (n_layers, 2, rows, n_kv_heads, capacity, head_dim).
        row_ids: (rows,) int64, which rows of kv are in use; None: all of them, in their order.
        lengths: (rows,) int64 on the host, tokens that each row holds.
        longest: how much of `capacity` a pass looks at.
        prompt_rows: (copies, documents) int64, the rows that the next packed documents go to.
    """

    def __init__(self, config, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, 2, rows, config.n_kv_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.row_ids = None
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.longest = 0
        self.prompt_rows = torch.arange(rows).unsqueeze(0)

    def layout(self, config, input_ids: Tensor, doc_lens: list[int] | None) -> Layout:
        """The layout of a pass over new tokens, which the cache takes note of.

        Args:
            input_ids: (rows, T) int64, the next tokens of each row; or (1, N) with doc_lens, packed
                prompts, which go to `prompt_rows`.
        """
        (B, T), device = input_ids.shape, input_ids.device
        if doc_lens is not None:
            layout = make_layout(config, input_ids, doc_lens=doc_lens)
            layout.doc_ids = None  # there is no load-balancing loss
            positions = torch.cat([torch.arange(n) for n in doc_lens])
            lens = layout.doc_lens[:-1]
            self.lengths[self.prompt_rows] = lens
            rows = self.prompt_rows.repeat_interleave(lens, dim=1)  # (copies, N)
        else:
            held, positions = int(self.lengths.max()), torch.arange(T) + self.lengths.unsqueeze(1)
            check_length(config, held + T)
            layout = Layout(*rotary_angles(config, positions.to(device)))
            if held and (T > 1 or self.lengths.min() < held):
                mask = torch.arange(held + T) <= positions.view(B, 1, T, 1)
                layout.mask = mask.to(device)
            self.lengths += T
            self.longest = held + T
            rows = torch.arange(B).repeat_interleave(T)  # (B * T,)
        if self.row_ids is not None:
            rows = self.row_ids[rows]
        layout.cache, layout.slots = self, (rows.to(device), positions.flatten().to(device))
        return layout

    def write(self, layer: int, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Put k, v (B, n_kv_heads, T, head_dim) there: rows (copies, n) or (n,), positions (n,)."""
        for held, new in zip(self.kv[layer], (k, v), strict=True):
            new = new.transpose(1, 2).flatten(0, 1)[: len(positions)]  # (n, n_kv_heads, head_dim)
            held[rows, :, positions] = new.to(held.dtype)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, n_kv_heads, longest, head_dim) each."""
        kv = self.kv[layer, :, :, :, : self.longest]
        return (kv if self.row_ids is None else kv[:, self.row_ids]).unbind(0)

    def update(self, layer: int, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Take up the new tokens; returns the keys and values that they attend to."""
        self.write(layer, k, v, *layout.slots)
        return (k, v) if layout.doc_lens is not None else self.read(layer)

    def keep(self, rows: Tensor) -> None:
        """Forget all other rows. Those that are kept are not moved."""
        self.row_ids = rows if self.row_ids is None else self.row_ids[rows]
        self.lengths = self.lengths[rows]


class Decoder:
    """The forward passes of generation. `MiniMindLM.make_decoder` may name a faster one.

    Attributes:
        prefill_tokens: of prompts in one pass.
        keeps_rows: whether the rows of the cache must stay as many as they are.
    """

    prefill_tokens = 2048
    keeps_rows = False

    def __init__(self, model, cache: KVCache):
        self.model, self.cache = model, cache

    def step(self, token: Tensor) -> Tensor:
        """Logits (R, vocab) float32 behind token (R,) int64, one for each row of the cache."""
        return self.model(token.unsqueeze(1), cache=self.cache).logits.squeeze(1).float()

    def read(self, ids: Tensor, lens: list[int], last: Tensor) -> Tensor:
        """Logits (prompts, vocab) behind prompts packed into ids (1, N) that end at `last`."""
        return self.model(ids, doc_lens=lens, logits_at=last, cache=self.cache).logits.float()

    def read_pieces(self, ids: Tensor, layout: Layout, last: Tensor) -> Tensor:
        """As `read`, of pieces of prompts, each behind what its row of the cache holds."""
        return self.model(ids, layout=layout, logits_at=last).logits.float()
