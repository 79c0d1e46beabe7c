"""What the measurements of speed share: models, rows of data, the clock, and how a figure is
written down."""

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dataset.lm_dataset import SFTDataset, load_tokenizer
from kernels.linear import multiply, products
from model.lm import LMConfig, MiniMindLM
from runtime.device import fast_dtype
from runtime.kernel_loader import apply_kernels

TOKENIZER = ROOT / "model/minimind_tokenizer"
Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # X, Y, loss mask of a row


def figure(
    what: str, value: float, least: float | None = None, most: float | None = None, detail: str = ""
) -> dict:
    """A line of the table: a ratio or share, and the bound it has to keep."""
    kept = (least is None or value >= least) and (most is None or value <= most)
    return {
        "what": what,
        "value": value,
        "least": least,
        "most": most,
        "kept": kept,
        "detail": detail,
    }


def dtypes(device: torch.device) -> list[str]:
    """float32, and bfloat16 where the machine multiplies it fast."""
    return ["float32", "bfloat16"] if fast_dtype(device) == torch.bfloat16 else ["float32"]


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    return (
        nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))
    )


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable, device: torch.device) -> float:
    sync(device)
    begin = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - begin


def warm_seconds(work: Callable, device: torch.device) -> float:
    """Seconds of some work that has been done before, the median of ten times."""
    return statistics.median([seconds_of(work, device) for _ in range(12)][2:])


def in_turn(variants: dict[str, Callable], turns: Iterable) -> dict[str, list[float]]:
    """What each variant makes of each turn: one after the other, so that a slow minute meets all of
    them."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for turn in turns:
        for name, measure in variants.items():
            results[name].append(measure(turn))
            print(f"  {name:28} {results[name][-1]:12,.3f}", flush=True)
    return results


def ratio(results: dict[str, list[float]], name: str, base: str) -> float:
    """Median of the ratios of two variants, round by round."""
    return statistics.median(
        ours / theirs for ours, theirs in zip(results[name], results[base], strict=True)
    )


def model_of(device: torch.device, **shape) -> MiniMindLM:
    """A model with the kernels that a stage has; MINIMIND_KERNELS=off: without."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**shape)).to(device)
    apply_kernels(
        model, torch.device(device), "float32"
    )  # and those of other dtypes when they are called
    return model


def qwen(config: LMConfig):
    """transformers' model of the same shape; its weights have the names of ours."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, head_dim=config.head_dim,
            num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
            rope_theta=config.rope_theta, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        )
    )  # fmt: skip


def samples_of(paths: list[str], max_seq_len: int, vocab_size: int | None = None) -> list[Sample]:
    """The rows of some SFT files, shuffled. Token ids of another vocabulary are as good for
    measuring speed."""
    tokenizer = load_tokenizer(TOKENIZER)
    datasets = [SFTDataset(path, tokenizer, max_seq_len) for path in paths]
    samples = [dataset[row] for dataset in datasets for row in range(len(dataset))]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return [samples[row] for row in order]


def random_prompts(
    count: int, generator: torch.Generator
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Prompts of 16 to 256 tokens; the same padded on the left, and where that is tokens: (count,
    longest) int64."""
    lens = torch.randint(16, 257, (count,), generator=generator)
    width = int(lens.max())
    mask = (torch.arange(width) >= width - lens.unsqueeze(1)).long()
    ids = torch.randint(10, 6400, mask.shape, generator=generator) * mask
    return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)], ids, mask


def supervised(samples: list[Sample]) -> int:
    return sum(int(sample[2].sum()) for sample in samples)


def matrix_peak(device: torch.device, dtype: str, tokens: int, config: LMConfig) -> float:
    """FLOP/s of the best matrix product among those of a training step: this machine's limit."""
    best, kind = 0.0, getattr(torch, dtype)
    shapes = ((tokens, config.dim, config.hidden_dim), (tokens, config.hidden_dim, config.dim),
              (config.hidden_dim, tokens, config.dim), (tokens, config.dim, config.dim))  # fmt: skip
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device).to(kind), torch.randn(n, k, device=device).to(kind)
        best = max(best, 2 * m * k * n / warm_seconds(lambda a=a, b=b: a @ b.T, device))
        if device.type == "cpu" and products(kind):  # our own, which may be faster
            out, b = a.new_empty(m, n), b.float()
            best = max(
                best,
                2
                * m
                * k
                * n
                / warm_seconds(lambda a=a, b=b, out=out: multiply(out, a, b.T), device),
            )
    return best


def step_flops(config: LMConfig, lens: list[int], heads: int) -> float:
    """Floating-point operations of the products in a forward and backward pass; attention counts
    its triangle.

    Args:
        lens: tokens of each document.
        heads: tokens that the head works on.
    Source: Chowdhery et al., PaLM (2022), appendix B: model FLOPs, without anything that is
    computed anew.
    """
    attention = config.dim * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    matrices = config.n_layers * (attention + 3 * config.dim * config.hidden_dim)
    triangles = (
        sum(n * (n + 1) / 2 for n in lens) * config.n_layers * config.n_heads * config.head_dim
    )
    return 6 * (sum(lens) * matrices + heads * config.vocab_size * config.dim) + 12 * triangles
