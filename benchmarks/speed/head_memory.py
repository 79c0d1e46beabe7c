"""Memory of the head and its loss, forward and backward, for a large vocabulary, against float32
logits."""

from pathlib import Path

import torch
from common import figure

from kernels.cross_entropy import linear_cross_entropy

VOCAB, TOKENS, DIM = 151_936, 8_192, 512


def memory(device: torch.device, key: str) -> int:
    """Bytes in use; the peak for VmHWM, which begins anew where VmRSS is asked for."""
    if device.type == "cuda":
        return (
            torch.cuda.max_memory_allocated() if key == "VmHWM" else torch.cuda.memory_allocated()
        )
    if key == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return 1024 * int(line.split()[1])


def measure(args) -> list[dict]:
    device = torch.device(args.device)
    x = torch.randn(TOKENS, DIM, device=device).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, device=device) * 0.02).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), device=device)
    linear_cross_entropy(
        x[:64], weight[:640], targets[:64] % 640
    ).backward()  # libraries are loaded

    x.grad = weight.grad = None
    before = memory(device, "VmRSS")
    linear_cross_entropy(x, weight, targets).backward()
    extra, logits = memory(device, "VmHWM") - before, 4 * TOKENS * VOCAB
    detail = (
        f"{extra / 1e6:,.0f} MB, of these {4 * VOCAB * DIM / 1e6:,.0f} MB the gradient of the"
        " weights"
    )
    what = (
        f"head and loss, vocabulary {VOCAB:,}, {TOKENS:,} tokens: peak extra memory / float32"
        " logits"
    )
    return [figure(what, extra / logits, most=0.1, detail=detail)]
