"""KVCache: the keys and values of the tokens before, and the forward passes that go on from them."""

import torch
from torch import Tensor

from model.layout import Layout


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

    def add(self, tokens: int, doc_lens: Tensor | None) -> Tensor:
        """Count new tokens: so many in each row, or the documents of a packed row.

        Returns:
            Their rows of kv, (rows * tokens,) int64 on the host, or (copies, sum of doc_lens).
        """
        if doc_lens is not None:
            self.lengths[self.prompt_rows] = doc_lens
            rows = self.prompt_rows.repeat_interleave(doc_lens, dim=1)
        else:
            self.lengths += tokens
            self.longest = int(self.lengths.max())
            rows = torch.arange(len(self.lengths)).repeat_interleave(tokens)
        return rows if self.row_ids is None else self.row_ids[rows]

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
