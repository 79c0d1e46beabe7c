"""What values flags may have, for all scripts in one place.

A number that makes no sense is refused before anything is read, built or written: a run that cannot
be would else end in the middle, in the words of a library, or never. Needs no package.
"""

import os
import re
import sys

WHOLE = 10**12  # no count that a machine could reach
REAL = 10**9
ABOVE_0 = 1e-30  # float32 ends at 1e-38, and products of two have to fit
# More processes than a few for each CPU wait for each other, and each takes memory.
WORKERS = max(16, 4 * (os.cpu_count() or 1))

# Least value, largest value, flags that are such a number
RANGES = [
    (0, 1, "eval_ratio dropout lora_dropout warmup_ratio kl_weight gamma gae_lambda overlap"),
    (0, 0.5, "label_smoothing"),
    (1e-3, 1, "mfu"),
    (ABOVE_0, 1, "top_p"),
    # sizes of a model
    (1, 1 << 24, "max_seq_len max_new_tokens vocab_size context"),
    (1, 1 << 17, "dim lora_rank"),
    (1, 1 << 14, "n_heads n_kv_heads"),
    (1, 1000, "n_layers"),
    (1, 4096, "n_experts n_experts_per_tok max_concurrent"),
    (0, 4096, "n_shared_experts"),
    # batches, steps and intervals
    (1, 10_000, "epochs updates_per_rollout mini_batches ppo_epochs"),
    (1, 1_000_000, "batch_size accumulation_steps save_total_limit"),
    (2, 4096, "group_size"),
    (0, WHOLE, "max_steps save_interval eval_interval sample_interval replica_check"),
    (1, WHOLE, "global_batch_size log_interval"),
    # other counts
    (0, WHOLE, "preview top_k show_wrong max_waiting hold_out max_restarts num_fewshot"),
    (1, WHOLE, "min_frequency limit max_body"),
    (0, 2**63 - 1, "seed"),  # what torch takes
    # losses, rollouts and optimisation
    (ABOVE_0, REAL, "lora_alpha beta clip value_clip"),
    (0, REAL, "sft_weight kl_beta clip_low clip_high value_weight grad_clip"),
    (-REAL, REAL, "simpo_gamma"),
    (1e-3, 1000, "temperature kl_temperature repetition_penalty"),
    (ABOVE_0, 1e30, "learning_rate"),
    (0, 1000, "weight_decay"),
    # machines
    (0, WORKERS, "num_workers"),
    (1, 4096, "nproc_per_node"),
    (1, 1 << 20, "tensor_parallel context_parallel pipeline_parallel nnodes devices nodes"),
    (0, 1 << 20, "node_rank"),
    (1, 65535, "master_port"),
    (0, 65535, "port"),
    (0.1, 7 * 24 * 3600, "request_timeout grace watch"),
    (1, 100_000, "bucket_cap_mb"),
    (1e-3, 365 * 24 * 60, "timeout"),  # a year, in minutes
    (1e-3, REAL, "device_memory_gb flops_tflops link_gbps"),
    (0, REAL, "latency_us"),
]
BOUNDS = {name: (least, most) for least, most, names in RANGES for name in names.split()}
FINITE = (-sys.float_info.max, sys.float_info.max)
# What these mostly are; other texts are looked at closely
ORDINARY = {"device": "auto|cpu|mps|cuda", "curriculum": "none|length", "save_weight": r"\w{1,40}"}


def usage_error(message: str) -> None:
    """What `parser.error` of every script is set to: one line, without argparse's usage."""
    from runtime.process.errors import shortened

    raise ValueError(f"{shortened(message, 300)}; --help lists the flags")


def check_flags(args: dict) -> None:
    """Refuse values that make no sense.

    Args:
        args: flag -> value.

    Raises:
        ValueError: names flag and value.
    """
    for name, value in args.items():
        if not is_ordinary(name, value):
            from runtime.process import odd_flags

            odd_flags.check_value(name, value, *BOUNDS.get(name, FINITE))
    if args.get("num_workers"):  # a reader that dies interrupts anything, an import, too
        from runtime.process import faults  # noqa: F401
    if not args.get("ddp", True):
        from runtime.launcher import read_launch

        if read_launch().world_size > 1:
            fault = "started by torchrun as several processes but without --ddp"
            raise ValueError(f"{fault}: add --ddp")


def is_ordinary(name: str, value: object) -> bool:
    """Whether a value is fine at first sight: a number within its bounds, printable text, None."""
    if isinstance(value, int | float):
        least, most = BOUNDS.get(name, FINITE)
        return least <= value <= most
    if isinstance(value, str):
        return value.isprintable() and bool(re.fullmatch(ORDINARY.get(name, ".*"), value))
    if isinstance(value, list) and (value or name == "report_to"):
        return all(is_ordinary("", part) for part in value)
    return value is None
