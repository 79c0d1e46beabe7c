"""Rollouts as GRPO writes them, sampled completions, against transformers' generate.

A prompt gets 8 completions of one length.
"""

import torch
from common import (
    autocast,
    dtypes,
    figure,
    in_turn,
    model_of,
    qwen,
    random_prompts,
    ratio,
    seconds_of,
)

from runtime.rl import sampler

PROMPTS, SAMPLES, NEW = 32, 8, 256
SHAPES = {"26 M": {"dim": 512, "n_layers": 8}, "104 M": {"dim": 768, "n_layers": 16}}


def measure(args) -> list[dict]:
    device = torch.device(args.device)
    return [
        compare(label, shape, device, dtypes(device)[-1], args.rounds)
        for label, shape in SHAPES.items()
    ]


def compare(label: str, shape: dict, device: torch.device, kind: str, rounds: int) -> dict:
    model = model_of(device, **shape, vocab_size=6400, max_seq_len=768)
    theirs = qwen(model.config).to(device).eval()
    theirs.load_state_dict(model.state_dict())
    prompts, ids, mask = random_prompts(PROMPTS, torch.Generator().manual_seed(0))
    ids, mask = ids.to(device), mask.to(device)

    def ours(step: int) -> None:
        options = {
            "batch_size": PROMPTS,
            "max_new_tokens": NEW,
            "temperature": 1.0,
            "end": -1,
        }
        keys = [(0, step, number, sample) for number in range(PROMPTS) for sample in range(SAMPLES)]
        sampler.generate(model, prompts, keys, **options, autocast=autocast(device, kind))

    @torch.inference_mode()
    def peer(step: int) -> None:
        options = {
            "do_sample": True,
            "top_k": 0,
            "num_return_sequences": SAMPLES,
            "pad_token_id": 0,
        }
        with autocast(device, kind):
            theirs.generate(
                ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, **options
            )

    works = {"ours": lambda step: seconds_of(lambda: ours(step), device)}
    works["transformers"] = lambda step: seconds_of(lambda: peer(step), device)
    for work in works.values():
        work(0)
    times = in_turn(works, range(rounds))
    detail = f"{PROMPTS * SAMPLES * NEW / min(times['ours']):,.0f} tokens/s"
    what = (
        f"rollouts, {label}, {PROMPTS} prompts x {SAMPLES} of {NEW} new, {kind}: tokens/s /"
        " transformers"
    )
    return figure(what, 1 / ratio(times, "ours", "transformers"), detail=detail)
