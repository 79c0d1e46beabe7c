"""A mixture of experts against the dense model with the same active parameters: the time of a training step.

With --compile in 16 bits also with both compiled; routing and the products of experts are not traced.
"""

import torch
from common import dtypes, figure, in_turn, model_of, ratio, samples_of
from training import Loop, ours

from runtime import parallel

SHAPE = {"dim": 512, "n_layers": 8, "vocab_size": 6400, "max_seq_len": 768}
MOE = {"use_moe": True, "n_experts": 4, "n_experts_per_tok": 1}  # each as wide as the whole dense MLP, by default
WARM = 8  # steps before the clock runs


def measure(args) -> list[dict]:
    device, samples, lines, rows = torch.device(args.device), samples_of(args.data_path, 768), [], args.step_rows
    count = WARM + args.rounds + 2
    steps = [[samples[(step * rows + n) % len(samples)] for n in range(rows)] for step in range(count)]
    warm, turns = steps[:WARM], steps[WARM:]
    for kind in dtypes(device):
        loops = {}
        for name, shape in {"dense": SHAPE, "MoE": SHAPE | MOE}.items():
            loops[name] = Loop(model_of(device, **shape), device, kind, ours, rows)
            if args.compile and kind != "float32":
                loops[f"{name}, compiled"] = Loop(model_of(device, **shape), device, kind, ours, rows)
                parallel.compile_blocks(loops[f"{name}, compiled"].model)
        for loop in loops.values():
            loop(sum(warm, []))  # a CPU prepares each new number of rows of an expert, the first time for milliseconds
        seconds = in_turn(loops, turns)
        what = "MoE, 4 experts, top-1:"
        lines.append(figure(f"{what} step time / dense, {kind}", ratio(seconds, "MoE", "dense"), most=1.15))
        if "MoE, compiled" in loops:
            both, gain = ratio(seconds, "MoE, compiled", "dense, compiled"), ratio(seconds, "MoE", "MoE, compiled")
            lines.append(figure(f"{what} step time / dense, both compiled, {kind}", both))
            lines.append(figure(f"{what} eager / compiled, {kind}", gain))
    return lines
