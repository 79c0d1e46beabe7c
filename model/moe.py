"""Mixture of experts: the MLP of a block whose tokens visit a few of many small MLPs.

Shapes: B rows, T tokens, N = B * T, C = dim, E experts, of which a token visits k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LMConfig
from model.layout import Layout


class Router(nn.Linear):
    """x (..., C) -> probabilities (..., E) in float32: in low precision routing is a coin toss."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(dim=-1)


class Experts(nn.Module):
    """The routed experts of a layer, each a SwiGLU, their weights stacked."""

    def __init__(self, n: int, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * hidden_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n, dim, hidden_dim))

    def forward(self, x: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
        """Of x (B, T, C) the weighted sum, (B, T, C), over the experts that each token chose.

        Args:
            weight: (B, T, k) float32.
            choice: (B, T, k) int64; what is no expert's number contributes nothing.
        """
        out = torch.zeros_like(x)
        for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            b, t, slot = (choice == e).nonzero(as_tuple=True)  # (n,) each: the tokens of expert e
            gate, up = F.linear(x[b, t], gate_up).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down) * weight[b, t, slot].unsqueeze(-1)
            out = out.index_put((b, t), y.to(out.dtype), accumulate=True)
        return out


class MoE(nn.Module):
    """Top-k routing over experts, plus shared experts that see every token. No token is dropped.

    The load-balancing loss is taken per document and averaged over documents by their tokens. Taken
    over whatever shares a batch it would change with the batch's layout; per document it is a sum
    over documents, like the cross-entropy, and any split into micro-batches and ranks gives one
    gradient.

    Source: Fedus et al., Switch Transformers (2021), eq. 4-6, E * sum_e f_e P_e, with the scope of
    a sequence as in DeepSeek-V2 (2024), eq. 23-25. It is 1 when the routing is even.
    """

    def __init__(self, config: LMConfig, shared_expert: nn.Module | None):
        super().__init__()
        self.config = config
        self.gate = Router(config.dim, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, config.dim, config.moe_hidden_dim)
        if shared_expert is not None:
            self.shared_expert = shared_expert

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        weight, choice, aux_loss = self.route(x, layout)
        out = self.experts(x, weight, choice)
        if self.config.n_shared_experts:
            out = out + self.shared_expert(x)
        return out, aux_loss

    def route(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen experts' weights and numbers, (B, T, k), and the load-balancing loss."""
        probs = self.gate(x)  # (B, T, E)
        weight, choice = probs.topk(self.config.n_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:  # a single one has the weight 1, without a gradient
            single = weight.size(-1) == 1
            weight = torch.ones_like(weight) if single else weight / weight.sum(-1, keepdim=True)
        return weight, choice, self.balance_loss(probs.flatten(0, 1), choice.flatten(0, 1), layout)

    def balance_loss(self, probs: Tensor, choice: Tensor, layout: Layout) -> Tensor:
        """Of probs (N, E) and choice (N, k): a scalar float32."""
        if layout.doc_ids is None:
            return probs.new_zeros(())
        E = probs.size(1)
        visits = F.one_hot(choice, E).sum(dim=1) / choice.size(1)
        values = torch.cat((torch.ones_like(probs[:, :1]), visits, probs), dim=1)  # (N, 1 + 2 E)
        sums = values.new_zeros(layout.docs + 1, 1 + 2 * E).index_add(0, layout.doc_ids, values)
        tokens, visits, probs = sums[:-1].split((1, E, E), dim=1)  # (docs, .), without padding
        tokens, visits = tokens.detach(), visits.detach()
        if layout.context is not None:
            tokens, visits = layout.context.total(tokens), layout.context.total(visits)
        loss = E * visits * probs / tokens.clamp_min(1.0)  # (docs, E); its sum is loss x tokens
        return self.config.aux_loss_alpha * loss.sum() / tokens.sum().clamp_min(1.0)
