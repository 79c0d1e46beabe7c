"""Pretraining steps of a dense model of a billion parameters on a GPU: model FLOP utilisation, and
memory.

Documents of 4,096 tokens, all of which are predicted, in bfloat16. The limit is the best matrix
product of the step.
"""

import statistics

import torch
from common import autocast, figure, matrix_peak, model_of, seconds_of, step_flops
from training import Loop

from kernels.compiling import compile_blocks
from runtime import parallel
from runtime.distributed.memory import estimate

SHAPE = {
    "dim": 2048,
    "n_layers": 22,
    "n_heads": 16,
    "n_kv_heads": 4,
    "vocab_size": 32768,
    "max_seq_len": 4096,
}
DOCUMENTS = 8  # of a step
VARIANTS = {  # what is compiled, the level of gradient checkpointing
    "eager": (False, 0),
    "compiled": (True, 0),
    "eager, level 2": (False, 2),
    "eager, level 1": (False, 1),
}


def pretrain(loop: Loop, ids: torch.Tensor) -> None:
    """ids (DOCUMENTS, max_seq_len + 1): every token but the first is predicted."""
    X, Y = ids[:, :-1].reshape(1, -1), ids[:, 1:].flatten()
    everywhere = torch.arange(len(Y), device=loop.device)
    with parallel.sync_gradients(loop.model, True):
        with autocast(loop.device, loop.dtype):
            out = loop.model(
                X, doc_lens=[X.size(1) // len(ids)] * len(ids), logits_at=everywhere, targets=Y
            )
        (out.loss / len(Y)).backward()


def measure(args) -> list[dict]:
    device, lines = torch.device(args.device), []
    length = SHAPE["max_seq_len"]
    tokens = DOCUMENTS * length
    for name, (compiled, level) in VARIANTS.items():
        model = model_of(device, **SHAPE)
        model.gradient_checkpointing = level
        if compiled:
            compile_blocks(model)
        loop = Loop(model, device, "bfloat16", pretrain)
        ids = torch.randint(model.config.vocab_size, (DOCUMENTS, length + 1), device=device)
        for _ in range(3):
            loop.step(ids)
        torch.cuda.reset_peak_memory_stats()
        turns = [
            seconds_of(lambda loop=loop, ids=ids: loop.step(ids), device)
            for _ in range(2 + 2 * args.rounds)
        ]
        memory, seconds = torch.cuda.max_memory_allocated(), statistics.median(turns)
        flops = step_flops(model.config, [length] * DOCUMENTS, tokens) / seconds
        limit = matrix_peak(device, "bfloat16", tokens, model.config)
        what = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M, {name}"
        rate = f"{flops / 1e12:.0f} of {limit / 1e12:.0f} TFLOP/s, {tokens / seconds:,.0f} tokens/s"
        least = 0.5 if compiled else None
        lines.append(figure(f"{what}: model FLOP utilisation", flops / limit, least, detail=rate))
        load = {
            "tokens": tokens,
            "supervised": tokens,
            "dtype": "bfloat16",
            "gradient_checkpointing": level,
        }
        guess = estimate(model.config, "ddp", data_ranks=1, **load)["total"]
        detail = f"{memory / 2**30:.1f} GiB"
        lines.append(
            figure(
                f"{what}: peak memory / runtime/distributed/memory.py",
                memory / guess,
                detail=detail,
            )
        )
        print(
            "\n".join(
                f"  {line['what']}: {line['value']:.3f}; {line['detail']}" for line in lines[-2:]
            ),
            flush=True,
        )
        del model, loop
        torch.cuda.empty_cache()
    return lines
