"""Generation on a GPU: the forward pass of a step is recorded once as a CUDA graph, and replayed.

The step of a small model is hundreds of operations that take microseconds each, faster than a host
can start them. A CUDA graph starts all of them at once.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.native import round_up
from model.kv_cache import Decoder, KVCache
from model.layout import Layout, rotary_angles

# cuDNN's, which is as fast on an H200, takes a tenth of a second to prepare each new shape.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Tokens of a row by which a recording is longer than the last one. The figures of
# benchmarks/results are with it and with `prefill_tokens`: h200.json, part generation of
# benchmarks/speed.
STEP = 128
# Weights that are read in float32; all other matrices, and biases, are cast once for all steps.
UNCAST = ("embed_tokens.weight", "mlp.gate.weight")


class DecodeGraph(Decoder):
    """The logits of a step are valid until the next one.

    Args:
        model: a MiniMindLM on a GPU.
        cache: its dtype is that of the products.
    """

    prefill_tokens = 16384
    keeps_rows = True

    def __init__(self, model, cache: KVCache):
        super().__init__(model, cache)
        rows, device = len(cache.lengths), cache.kv.device
        self.graph, self.longest = None, 0
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # what a recording reads
        self.held = torch.zeros(rows, dtype=torch.int64, device=device)
        named = model.named_parameters(remove_duplicate=False)
        factors = ((name, p) for name, p in named if p.dim() > 1 or name.endswith("bias"))
        self.weights = {
            name: p.to(cache.kv.dtype) for name, p in factors if not name.endswith(UNCAST)
        }

    def step(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.held.copy_(self.cache.lengths, non_blocking=True)
        longest = int(self.cache.lengths.max()) + 1
        if longest > self.longest:
            self.longest = min(round_up(longest, STEP), self.cache.kv.size(-2))
            self.cache.longest = self.longest
            self.record()
        self.cache.lengths += 1
        self.graph.replay()
        return self.logits

    def record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries first make what they need, which is not recorded
            self.forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = self.forward()

    def forward(self) -> Tensor:
        """What is recorded: nothing is read on the host."""
        device, dtype = self.held.device, self.cache.kv.dtype
        hidden = torch.arange(self.longest, device=device) > self.held.view(-1, 1, 1, 1)
        # To be added: each layer would convert a bool.
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
        slots = torch.arange(len(self.held), device=device), self.held
        angles = rotary_angles(self.model.config, self.held.unsqueeze(1))
        layout = Layout(*angles, mask=mask, cache=self.cache, slots=slots)
        ids, inputs = self.token.unsqueeze(1), {"layout": layout}
        with sdpa_kernel(KERNELS):
            call = torch.func.functional_call
            out = call(self.model, self.weights, ids, inputs, tie_weights=False)
        return out.logits.squeeze(1).float()
