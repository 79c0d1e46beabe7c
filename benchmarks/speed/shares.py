"""Where the time goes, in the steps that the other parts compare: the profile behind the distance
to a limit.

Shares of the time that operations themselves take, by what they do. Beside them the rate of the
products of a training step, each alone and repeated, so that its factors lie in the cache: with
anything else for nothing, a step could reach that share of the best product and no more.
"""

import torch
from common import (
    autocast,
    dtypes,
    figure,
    matrix_peak,
    model_of,
    samples_of,
    supervised,
    warm_seconds,
)
from experts import MOE, SHAPE
from torch.profiler import ProfilerActivity, profile, record_function
from training import ROWS, Loop, ours

from kernels.compiling import compile_blocks
from kernels.linear import multiply, products, sum_of_products
from kernels.native import Function
from model.kv_cache import Decoder, KVCache
from runtime.device import keep_memory

KINDS = {  # the first that the name of an operation, or of a function of kernels/*.cpp, contains
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention", "native::att"),
    "matrix products": (
        "aten::mm",
        "addmm",
        "_grouped_mm",
        "native::linear",
        "router_logits",
        "native::project",
        "native::mlp",
    ),  # of generation, with what stands between them
    "optimizer": ("adamw",),
    "fused passes": ("CompiledFxGraph", "native::"),
    "other passes over memory, calls": ("",),
}
STEPS = 4  # whose rows are trained on


def shares(what: str, work, device: torch.device) -> list[dict]:
    """Lines with the share of each kind of operation in some work."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    call = Function.__call__

    def recorded(function: Function, *args) -> int:  # the profiler sees operations of torch alone
        with record_function(f"native::{function.name}"):
            return call(function, *args)

    Function.__call__ = recorded
    with profile(activities=activities) as record:
        work()
    Function.__call__ = call
    spent = dict.fromkeys(KINDS, 0.0)
    for event in record.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[
            next(kind for kind, names in KINDS.items() if any(name in event.key for name in names))
        ] += own
    total = sum(spent.values())
    return [figure(f"{what}: share of {kind}", own / total) for kind, own in spent.items() if own]


def products_alone(config, tokens: int, targets: int, dtype: str, device: torch.device) -> float:
    """FLOP/s of the products of a training step, forward and backward, each alone and warm."""
    kind, seconds, flops = getattr(torch, dtype), 0.0, 0.0
    heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    sizes = ((config.dim, heads, 1), (config.dim, kv, 2), (heads, config.dim, 1),
             (config.dim, config.hidden_dim, 2), (config.hidden_dim, config.dim, 1))  # fmt: skip
    shapes = [(tokens, width, out, config.n_layers * times) for width, out, times in sizes]
    shapes.append((targets, config.dim, config.vocab_size, 1))
    for rows, width, out, times in shapes:
        x, w, g = (
            torch.randn(*size, device=device) for size in ((rows, width), (out, width), (rows, out))
        )
        cast = (
            device.type != "cpu" or not products(kind) or out == config.vocab_size
        )  # other weights: by the product
        x, w, g = x.to(kind), w.to(kind) if cast else w, g.to(kind)
        for product in ((torch.empty_like(g), x, w.T), (torch.empty_like(x), g, w)):
            seconds += times * warm_seconds(lambda product=product: multiply(*product), device)
        total = torch.empty(out, width, device=device)
        seconds += times * warm_seconds(
            lambda x=x, g=g, total=total: sum_of_products(total, g, x), device
        )
        flops += times * 6 * rows * width * out
    return flops / seconds


def measure(args) -> list[dict]:
    device, samples = torch.device(args.device), samples_of(args.data_path, 768)
    fast, lines = dtypes(device)[-1], []
    keep_memory()  # as a stage does
    models = {"SFT step": {}, "SFT step, compiled": {}, "SFT step, MoE": MOE}
    if not args.compile:
        del models["SFT step, compiled"]
    rows = samples[: STEPS * ROWS]
    for what, options in models.items():
        model = model_of(device, **SHAPE, **options)
        if "compiled" in what:
            compile_blocks(model)
        loop = Loop(model, device, fast, ours)
        loop(rows)
        lines += shares(f"{what}, {fast}", lambda loop=loop: loop(rows), device)
    tokens, targets = sum(len(X) for X, _, _ in rows) // STEPS, supervised(rows) // STEPS
    config = model_of(torch.device("cpu"), **SHAPE).config
    alone = products_alone(config, tokens, targets, fast, device) / matrix_peak(
        device, fast, tokens, config
    )
    lines.append(figure(f"SFT step, {fast}: products alone / matrix-product peak", alone))
    return lines + [line for kind in dtypes(device) for line in decoding(kind, device)]


@torch.no_grad()
def decoding(dtype: str, device: torch.device) -> list[dict]:
    """Steps of generation: 64 rows that hold 200 tokens on average."""
    model = model_of(device, **SHAPE).eval()
    cache = KVCache(model.config, 64, 400, device, getattr(torch, dtype))
    token, lens = torch.arange(64, device=device), torch.linspace(330, 70, 64).long()

    def steps() -> None:
        for _ in range(20):
            cache.lengths[:] = lens
            decoder.step(token)

    with autocast(device, dtype):
        decoder = (model.make_decoder or Decoder)(model, cache)
        steps()
        return shares(f"generation, a token of 64 rows, {dtype}", steps, device)
