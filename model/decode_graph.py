"""One more token for each row of a batch, on a GPU: the forward pass of lm.py, recorded once and replayed.

The step of a small model is hundreds of operations that take microseconds each, faster than a host can start them. A
CUDA graph starts all of them at once.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention import Layout
from model.ops import round_up

# cuDNN's, which is as fast, takes a tenth of a second to prepare each new shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
STEP = 128  # places of the cache by which a recording is longer than the last one


class DecodeGraph:
    """Calls as `model(token.unsqueeze(1), cache=cache)` does it, but returns (R, vocab) float32, until the next call.

    Args:
        model: a MiniMindLM on a GPU.
        cache: a KVCache, whose dtype is that of the products; it keeps its rows.
    """

    def __init__(self, model, cache):
        rows, device = len(cache.lengths), cache.kv.device
        self.model, self.cache, self.graph, self.longest = model, cache, None, 0
        self.token, self.held = torch.zeros(2, rows, dtype=torch.int64, device=device)  # the input of a recording
        # Weights are cast once for all steps, but for those that are read in float32.
        kept = ("embed_tokens.weight", "mlp.gate.weight")
        named = model.named_parameters(remove_duplicate=False)
        self.weights = {n: p.to(cache.kv.dtype) for n, p in named if p.dim() > 1 and not n.endswith(kept)}

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.held.copy_(self.cache.lengths, non_blocking=True)
        longest = int(self.cache.lengths.max()) + 1
        if longest > self.longest:
            self.longest = self.cache.longest = min(round_up(longest, STEP), self.cache.kv.size(-2))
            self.record()
        self.cache.lengths += 1
        self.graph.replay()
        return self.logits

    def record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make what they need the first time, which cannot be recorded
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self.step()

    def step(self) -> Tensor:
        """What is recorded: nothing is read on the host."""
        device, dtype = self.held.device, self.cache.kv.dtype
        hidden = torch.arange(self.longest, device=device) > self.held.view(-1, 1, 1, 1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
        places = torch.arange(len(self.held), device=device), self.held
        rotation = self.model.rotation(self.held.unsqueeze(1))
        inputs = {"layout": Layout(*rotation, None, None, mask, None, self.cache, places, None)}
        with sdpa_kernel(KERNELS):
            ids = self.token.unsqueeze(1)
            out = torch.func.functional_call(self.model, self.weights, ids, inputs, tie_weights=False)
        return out.logits.squeeze(1).float()
