"""A mixture of experts against the dense model with the same active parameters: the time of a training step."""

import torch
from common import dtypes, figure, in_turn, model_of, ratio, samples_of
from training import Loop, ours

SHAPE = {"dim": 512, "n_layers": 8, "vocab_size": 6400, "max_seq_len": 768}
MOE = {"use_moe": True, "n_experts": 4, "n_experts_per_tok": 1}  # each as wide as the whole dense MLP, by default
WARM = 8  # steps before the clock runs


def measure(args) -> list[dict]:
    device, samples, lines, rows = torch.device(args.device), samples_of(args.data_path, 768), [], args.step_rows
    count = WARM + args.rounds + 2
    steps = [[samples[(step * rows + n) % len(samples)] for n in range(rows)] for step in range(count)]
    warm, turns = steps[:WARM], steps[WARM:]
    for kind in dtypes(device):
        dense = model_of(device, **SHAPE)
        moe = model_of(device, **SHAPE, **MOE)
        loops = {"dense": Loop(dense, device, kind, ours, rows), "MoE": Loop(moe, device, kind, ours, rows)}
        for loop in loops.values():
            loop(sum(warm, []))  # a CPU prepares each new number of rows of an expert, the first time for milliseconds
        seconds = in_turn(loops, turns)
        lines.append(
            figure(f"MoE, 4 experts, top-1: step time / dense, {kind}", ratio(seconds, "MoE", "dense"), most=1.15)
        )
    return lines
