"""A mixture of experts against the dense model with the same active parameters: the time of a
training step.

Beside it what the machine would allow: what the weights cost that the dense model does not have,
each of which is read twice, has a gradient and is updated, however few tokens come by. With
--compile in 16 bits also with both compiled; routing and the products of experts are not traced.
"""

import functools
import statistics

import torch
from common import dtypes, figure, in_turn, model_of, ratio, samples_of, seconds_of, warm_seconds
from training import Loop, ours

from kernels.compiling import compile_blocks
from runtime.device import keep_memory

SHAPE = {"dim": 512, "n_layers": 8, "vocab_size": 6400, "max_seq_len": 768}
MOE = {
    "use_moe": True,
    "n_experts": 4,
    "n_experts_per_tok": 1,
}  # each as wide as the whole dense MLP, by default
WARM = 8  # steps before the clock runs


def measure(args) -> list[dict]:
    device, samples, lines, rows = (
        torch.device(args.device),
        samples_of(args.data_path, 768),
        [],
        args.step_rows,
    )
    keep_memory()  # as a stage does
    count = WARM + args.rounds + 2
    steps = [
        [samples[(step * rows + n) % len(samples)] for n in range(rows)] for step in range(count)
    ]
    warm, turns = steps[:WARM], steps[WARM:]
    for kind in dtypes(device):
        loops = {}
        for name, shape in {"dense": SHAPE, "MoE": SHAPE | MOE}.items():
            loops[name] = Loop(model_of(device, **shape), device, kind, ours, rows)
            if args.compile and kind != "float32":
                loops[f"{name}, compiled"] = Loop(
                    model_of(device, **shape), device, kind, ours, rows
                )
                compile_blocks(loops[f"{name}, compiled"].model)
        for loop in loops.values():
            loop(
                sum(warm, [])
            )  # a CPU prepares each new number of rows of an expert, the first time for milliseconds
        seconds = in_turn(loops, turns)
        what = "MoE, 4 experts, top-1:"
        lines.append(
            figure(f"{what} step time / dense, {kind}", ratio(seconds, "MoE", "dense"), most=1.15)
        )
        more, dense = memory_seconds(loops, turns, device), statistics.median(seconds["dense"])
        detail = f"{more * 1e3:.0f} ms of {dense * 1e3:.0f} ms"
        lines.append(
            figure(
                f"{what} the memory of its weights alone, {kind}", 1 + more / dense, detail=detail
            )
        )
        if "MoE, compiled" in loops:
            both, gain = (
                ratio(seconds, "MoE, compiled", "dense, compiled"),
                ratio(seconds, "MoE", "MoE, compiled"),
            )
            lines.append(figure(f"{what} step time / dense, both compiled, {kind}", both))
            lines.append(figure(f"{what} eager / compiled, {kind}", gain))
    return lines


def memory_seconds(loops: dict[str, Loop], turns: list, device: torch.device) -> float:
    """Seconds a step for the weights that MoE has and the dense model has not: two reads, a
    gradient, the update."""

    def update(loop: Loop, rows: list) -> float:
        loop.gradients(loop, rows)
        return seconds_of(loop.update, device)

    names = ("dense", "MoE")
    seconds = in_turn(
        {f"{name}, update": functools.partial(update, loops[name]) for name in names}, turns
    )
    dense, moe = (sum(p.numel() for p in loops[name].model.parameters()) for name in names)
    forward, backward, gradient = (torch.ones(moe - dense, device=device) for _ in range(3))
    passes = warm_seconds(lambda: torch.add(forward, backward, out=gradient), device)
    return (
        passes
        + statistics.median(seconds["MoE, update"])
        - statistics.median(seconds["dense, update"])
    )
