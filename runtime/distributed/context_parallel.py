"""Context parallelism: the ranks of a group hold one part each of every row of tokens.

They meet in attention only. A row of N tokens is cut into equal parts, whatever documents lie in it. Two ways to attend across
the cuts:

- all-to-all over heads: every rank gives its tokens of other heads away and gets all tokens of its
  own heads, attends, and gives back. Four messages of N/P tokens a layer; needs heads that can be
  divided.
  Source: Jacobs et al., DeepSpeed Ulysses (2023), section 3.
- all-gather: every rank gets the keys and values of the whole row, and attends with its own
  queries.
  Source: Dubey et al., The Llama 3 Herd of Models (2024), section 3.3.2.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import (
    all_gather_tensor_autograd,
    all_to_all_single_autograd,
)

from model.layout import Layout, make_layout


class Context:
    """The ranks that share a row; `MiniMindLM.context` is set to one."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def part(self, tokens: int) -> slice:
        """What this rank holds of a row of so many tokens."""
        size = tokens // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def layout(self, config, input_ids: Tensor, doc_lens: list[int] | None) -> Layout:
        """The layout of this rank's tokens (1, n); its documents are those of the whole row."""
        tokens = input_ids.size(1) * self.size
        layout = make_layout(config, input_ids.new_empty(len(input_ids), tokens), None, doc_lens)
        part = self.part(tokens)
        layout.cos, layout.sin = layout.cos[:, part], layout.sin[:, part]
        if layout.doc_ids is not None:
            layout.doc_ids = layout.doc_ids[part]
        layout.context = self
        return layout

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share the row, without a gradient."""
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def attend(
        self, attention: Callable, q: Tensor, k: Tensor, v: Tensor, layout: Layout
    ) -> Tensor:
        """Causal attention inside each document of the row.

        Args:
            attention: `document_attention`, or one that computes the same.
            q, k, v: (1, H, n, D) and (1, H_kv, n, D), this rank's n tokens.
            layout: its documents are those of the whole row.

        Returns:
            (1, H, n, D).
        """
        if q.size(1) % self.size == 0 and k.size(1) % self.size == 0:
            q, k, v = self.all_tokens_of_some_heads(q, k, v)
            return self.some_tokens_of_all_heads(attention(q, k, v, layout))
        kv = torch.stack((k[0], v[0])).movedim(2, 0).contiguous()  # (n, 2, H_kv, D)
        kv = all_gather_tensor_autograd(kv, 0, self.group)  # (N, 2, H_kv, D)
        k, v = kv.movedim(0, 2).unsqueeze(1)  # (1, H_kv, N, D) each
        return cut_attention(q, k, v, layout.doc_lens, self.part(k.size(2)))

    def all_tokens_of_some_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(1, H, n, D) -> (1, H / P, N, D) for each of some tensors, in one message."""
        heads = [t.size(1) // self.size for t in tensors]
        by_rank = [t[0].unflatten(0, (self.size, -1)) for t in tensors]
        sent = torch.cat(by_rank, dim=1)  # (P, sum of H / P, n, D)
        received = self.exchange(sent)  # the first dimension is now the part of the row
        return received.transpose(0, 1).flatten(1, 2).unsqueeze(0).split(heads, dim=1)

    def some_tokens_of_all_heads(self, tensor: Tensor) -> Tensor:
        """(1, H / P, N, D) -> (1, H, n, D)."""
        sent = tensor[0].unflatten(1, (self.size, -1)).transpose(0, 1)  # (P, H / P, n, D)
        return self.exchange(sent).flatten(0, 1).unsqueeze(0)

    def exchange(self, tensor: Tensor) -> Tensor:
        """Rank r's tensor[s] becomes rank s's tensor[r]."""
        return all_to_all_single_autograd(tensor.contiguous(), None, None, self.group)


def cut_attention(q: Tensor, k: Tensor, v: Tensor, doc_lens: Tensor, held: slice) -> Tensor:
    """`document_attention` of the queries of some tokens (`held`), keys and values of all."""
    outs, start = [], 0
    for end in doc_lens.cumsum(0).tolist():
        first, last = max(start, held.start), min(end, held.stop)
        if first < last:
            queries = q[:, :, first - held.start : last - held.start]
            keys, values = k[:, :, start:last], v[:, :, start:last]
            mask = None
            if first > start:  # the document began in another part: keys up to the query's place
                size = (last - first, last - start)
                mask = torch.ones(size, dtype=torch.bool, device=q.device).tril(first - start)
            out = F.scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, enable_gqa=True
            )
            outs.append(out)
        start = end
    return torch.cat(outs, dim=2)
