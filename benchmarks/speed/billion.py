"""Pretraining steps of a dense model of a billion parameters on a GPU: model FLOP utilisation, and memory.

Documents of 4,096 tokens, all of which are predicted, in bfloat16. The limit is the best matrix product of the step.
"""

import statistics

import torch
from common import autocast, figure, matrix_peak, seconds_of, step_flops

from model.lm import LMConfig, MiniMindLM
from runtime import parallel
from runtime.memory import estimate
from runtime.optim import make_optimizer

SHAPE = {"dim": 2048, "n_layers": 22, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 32768, "max_seq_len": 4096}
VARIANTS = {  # what is compiled, the level of gradient checkpointing, documents of a step
    "eager": (False, 0, 8),
    "compiled": (True, 0, 8),
    "eager, level 2": (False, 2, 8),
    "eager, level 1": (False, 1, 8),
}


def measure(args) -> list[dict]:
    device, lines = torch.device(args.device), []
    for name, (compiled, level, documents) in VARIANTS.items():
        torch.manual_seed(0)
        model = MiniMindLM(LMConfig(**SHAPE), level).to(device)
        if compiled:
            parallel.compile_blocks(model)
        optimizer = make_optimizer(model, "adamw", 1e-4, 0.1)
        lens = [model.config.max_seq_len] * documents
        ids = torch.randint(model.config.vocab_size, (1, sum(lens) + 1), device=device)
        everywhere = torch.arange(sum(lens), device=device)

        def step(model=model, optimizer=optimizer, ids=ids, lens=lens, at=everywhere) -> None:
            with parallel.sync_gradients(model, True):
                with autocast(device, "bfloat16"):
                    out = model(ids[:, :-1], doc_lens=lens, logits_at=at, targets=ids[0, 1:])
                (out.loss / len(at)).backward()
            parallel.clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(3):
            step()
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(seconds_of(step, device) for _ in range(2 + 2 * args.rounds))
        memory = torch.cuda.max_memory_allocated()
        flops = step_flops(model.config, lens, sum(lens)) / seconds
        limit = matrix_peak(device, "bfloat16", sum(lens), model.config)
        parameters = sum(p.numel() for p in model.parameters())
        least = 0.5 if name == "compiled" else None
        rate = f"{flops / 1e12:.0f} of {limit / 1e12:.0f} TFLOP/s, {sum(lens) / seconds:,.0f} tokens/s"
        lines.append(
            figure(f"{parameters / 1e6:,.0f} M, {name}: model FLOP utilisation", flops / limit, least, detail=rate)
        )
        load = {"tokens": sum(lens), "supervised": sum(lens), "dtype": "bfloat16", "gradient_checkpointing": level}
        guess = estimate(model.config, "ddp", data_ranks=1, **load)["total"]
        detail = f"{memory / 2**30:.1f} GiB"
        lines.append(
            figure(f"{parameters / 1e6:,.0f} M, {name}: peak memory / runtime/memory.py", memory / guess, detail=detail)
        )
        print("\n".join(f"  {line['what']}: {line['value']:.3f}; {line['detail']}" for line in lines[-2:]), flush=True)
        del model, optimizer, step
        torch.cuda.empty_cache()
    return lines
