"""Memory of the head and its loss, forward and backward, for a large vocabulary, against float32 logits."""

import resource

import torch
from common import figure

from model.ops import linear_cross_entropy

VOCAB, TOKENS, DIM = 151_936, 8_192, 512


def measure(args) -> list[dict]:
    device = torch.device(args.device)
    x = torch.randn(TOKENS, DIM, device=device).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, device=device) * 0.02).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), device=device)
    linear_cross_entropy(x[:64], weight[:640], targets[:64] % 640).backward()  # libraries are loaded

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(0).ru_maxrss

    x.grad = weight.grad = None
    before = peak()
    linear_cross_entropy(x, weight, targets).backward()
    extra, logits = peak() - before, 4 * TOKENS * VOCAB
    detail = f"{extra / 1e6:,.0f} MB, of these {4 * VOCAB * DIM / 1e6:,.0f} MB the gradient of the weights"
    what = f"head and loss, vocabulary {VOCAB:,}, {TOKENS:,} tokens: peak extra memory / float32 logits"
    return [figure(what, extra / logits, most=0.1, detail=detail)]
