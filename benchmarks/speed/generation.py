"""New tokens per second against transformers' generate: the same weights, prompts and lengths of
the completions.

Once all completions have the same length; once each has one of its own, as completions of a trained
model have. Beside them what the machine would allow: the products alone, of prompts and new tokens,
at the rate of the best of them, and the keys and values of a row, read once for each of its new
tokens at the rate of a sum over memory. In bfloat16 transformers has its weights in it, which is
faster than autocast.
"""

import functools
import statistics

import torch
from common import (
    autocast,
    dtypes,
    figure,
    in_turn,
    matrix_peak,
    model_of,
    qwen,
    random_prompts,
    ratio,
    seconds_of,
    step_flops,
    warm_seconds,
)
from transformers import StoppingCriteria

from kernels.cpu_decoder import CpuDecoder, is_supported
from model.generate_batch import generate_batch
from model.kv_cache import KVCache
from model.sampling import make_sampler

BATCH, NEW = 64, 128


class OwnLengths(StoppingCriteria):
    """transformers' way to end each row at a length of its own."""

    def __init__(self, ends: torch.Tensor):
        self.ends = ends

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        return input_ids.size(1) >= self.ends


def measure(args) -> list[dict]:
    device, lines = torch.device(args.device), []
    model = model_of(device, dim=512, n_layers=8, vocab_size=6400, max_seq_len=768).eval()
    generator = torch.Generator().manual_seed(0)
    prompts, ids, mask = random_prompts(BATCH, generator)
    width = ids.size(1)
    limits = {
        "each 128": [NEW] * BATCH,
        "1 to 128": torch.randint(1, NEW + 1, (BATCH,), generator=generator).tolist(),
    }
    tokens, ids, mask = int(mask.sum()), ids.to(device), mask.to(device)

    def ours(kind: str, limits: list[int]) -> torch.Tensor:
        out = torch.zeros(BATCH, NEW, dtype=torch.int64, device=device)
        sampler = make_sampler(prompts, 6400, device)
        with autocast(device, kind):
            for row, position, token in generate_batch(
                model, prompts, limits, sampler, batch_size=BATCH
            ):
                out[row, position] = token
        return out

    theirs = {}
    for kind in dtypes(device):
        theirs[kind] = qwen(model.config).to(device, getattr(torch, kind)).eval()
        theirs[kind].load_state_dict(model.state_dict())

    @torch.inference_mode()
    def peer(kind: str, limits: list[int]) -> torch.Tensor:
        ends = OwnLengths(width + torch.tensor(limits, device=device))
        options = {
            "max_new_tokens": max(limits),
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        return theirs[kind].generate(ids, attention_mask=mask, stopping_criteria=[ends], **options)[
            :, width:
        ]

    def best_product(kind: str) -> float:
        """FLOP/s."""
        peak = matrix_peak(device, kind, tokens, model.config)
        if device.type == "cpu" and is_supported(
            model, getattr(torch, kind)
        ):  # our own products may be faster
            decoder = CpuDecoder(model, KVCache(model.config, 1, 1, device, getattr(torch, kind)))
            x, (weight, *_) = torch.randn(tokens, model.config.dim), decoder.layers[0]
            work = functools.partial(decoder.project, x, weight)
            peak = max(peak, 2 * work().numel() * model.config.dim / warm_seconds(work, device))
        return peak

    numbers = torch.ones(2**26, device=device)  # 256 MiB
    for kind in dtypes(device):
        peak, memory = best_product(kind), 4 * len(numbers) / warm_seconds(numbers.sum, device)
        for name, most in limits.items():
            works = {"ours": lambda _, args=(kind, most): seconds_of(lambda: ours(*args), device)}
            works["transformers"] = lambda _, args=(kind, most): seconds_of(
                lambda: peer(*args), device
            )
            a, b = (
                ours(kind, most),
                peer(kind, most),
            )  # before the clock runs: both prepare products by their shape
            times = in_turn(works, range(args.rounds))
            peak = max(peak, best_product(kind))
            same = sum(
                int((x[:n] == y[:n]).sum()) for x, y, n in zip(a, b, most, strict=True)
            ) / sum(most)
            detail = (
                f"{sum(most) / min(times['ours']):,.0f} tokens/s; {same:.1%} of the tokens are the"
                " same"
            )
            what = (
                f"generation, {BATCH} prompts of 16 to 256 tokens, {name} new, {kind}: tokens/s /"
                " transformers"
            )
            lines.append(
                figure(what, 1 / ratio(times, "ours", "transformers"), least=4.0, detail=detail)
            )
            lens = [len(prompt) + new for prompt, new in zip(prompts, most, strict=True)]
            flops = step_flops(model.config, lens, sum(most)) / 3  # the forward pass of a step
            held = sum(
                len(prompt) * new + new * new / 2 for prompt, new in zip(prompts, most, strict=True)
            )
            size = (
                held * 2 * model.config.n_layers * model.config.n_kv_heads * model.config.head_dim
            )
            size *= getattr(torch, kind).itemsize
            limit = statistics.median(times["transformers"]) / (flops / peak + size / memory)
            detail = f"{flops / 1e9:,.0f} GFLOP at {peak / 1e9:,.0f} GFLOP/s"
            detail += f", {size / 1e9:.1f} GB at {memory / 1e9:.0f} GB/s"
            lines.append(
                figure(f"{what}: the products and reading the cache alone", limit, detail=detail)
            )
    return lines
