"""What values flags may have, for all scripts in one place. Needs no package until a model's size
is asked for.

A number that makes no sense is refused before anything is read, built or written: a run that cannot
be would else end in the middle, in the words of a library, or never.
"""

import math
import os
import re

from runtime.launcher import read_launch
from runtime.terminal import shortened

WHOLE = 10**12  # no count that a machine could reach
REAL = 10**9
ABOVE_0 = (
    1e-30  # the least number that is not 0: float32 ends at 1e-38, and products of two have to fit
)
# More processes than a few for each CPU wait for each other, and each takes memory.
WORKERS = max(16, 4 * (os.cpu_count() or 1))

# Every flag that is a number -> its least and its largest value.
BOUNDS = {
    # data
    "max_seq_len": (1, 1 << 24),
    "eval_ratio": (0, 1),
    "num_workers": (0, WORKERS),
    "preview": (0, WHOLE),
    # model
    "dim": (1, 1 << 17),
    "n_layers": (1, 1000),
    "n_heads": (1, 1 << 14),
    "n_kv_heads": (1, 1 << 14),
    "dropout": (0, 1),
    "n_experts": (1, 4096),
    "n_experts_per_tok": (1, 4096),
    "n_shared_experts": (0, 4096),
    "vocab_size": (1, 1 << 24),
    "lora_rank": (1, 1 << 17),
    "lora_alpha": (ABOVE_0, REAL),
    "lora_dropout": (0, 1),
    # losses
    "beta": (ABOVE_0, REAL),
    "label_smoothing": (0, 0.5),
    "simpo_gamma": (-REAL, REAL),
    "sft_weight": (0, REAL),
    "kl_weight": (0, 1),
    "kl_temperature": (1e-3, 1000),
    "kl_beta": (0, REAL),
    "clip": (ABOVE_0, REAL),
    "clip_low": (0, REAL),
    "clip_high": (0, REAL),
    "value_clip": (ABOVE_0, REAL),
    "value_weight": (0, REAL),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    # rollouts and replies
    "group_size": (2, 4096),
    "max_new_tokens": (1, 1 << 24),
    "temperature": (1e-3, 1000),
    "top_k": (0, WHOLE),
    "top_p": (ABOVE_0, 1),
    "repetition_penalty": (1e-3, 1000),
    "sample_interval": (0, WHOLE),
    "updates_per_rollout": (1, 10_000),
    "mini_batches": (1, 10_000),
    "ppo_epochs": (1, 10_000),
    "show_wrong": (0, WHOLE),
    # optimisation
    "epochs": (1, 10_000),
    "max_steps": (0, WHOLE),
    "batch_size": (1, 1_000_000),
    "accumulation_steps": (1, 1_000_000),
    "global_batch_size": (1, WHOLE),
    "learning_rate": (ABOVE_0, 1e30),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, 1000),
    "grad_clip": (0, REAL),
    "seed": (0, 2**63 - 1),  # what torch takes
    # machine
    "tensor_parallel": (1, 1 << 20),
    "context_parallel": (1, 1 << 20),
    "pipeline_parallel": (1, 1 << 20),
    "bucket_cap_mb": (1, 100_000),
    "replica_check": (0, WHOLE),
    # output
    "save_interval": (0, WHOLE),
    "save_total_limit": (1, 1_000_000),
    "log_interval": (1, WHOLE),
    "eval_interval": (0, WHOLE),
    # scripts/
    "nproc_per_node": (1, 4096),
    "nnodes": (1, 1 << 20),
    "node_rank": (0, 1 << 20),
    "master_port": (1, 65535),
    "max_restarts": (0, WHOLE),
    "timeout": (1e-3, 365 * 24 * 60),  # a year, in minutes
    "devices": (1, 1 << 20),
    "nodes": (1, 1 << 20),
    "device_memory_gb": (1e-3, REAL),
    "flops_tflops": (1e-3, REAL),
    "mfu": (1e-3, 1),
    "link_gbps": (1e-3, REAL),
    "latency_us": (0, REAL),
    "overlap": (0, 1),
    # trainer/train_tokenizer.py
    "hold_out": (0, WHOLE),
    "min_frequency": (1, WHOLE),
}


def usage_error(message: str) -> None:
    """What `parser.error` of every script is set to: one line, without argparse's screen of
    usage."""
    raise ValueError(f"{shortened(message, 300)}; --help lists the flags")


def check_flags(args: dict) -> None:
    """Refuse values that make no sense, and a model that this machine cannot hold.

    Args:
        args: flag -> value.

    Raises:
        ValueError: names flag and value.
    """
    for name, value in args.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(name, value)
        if value == [] and name != "report_to":
            raise ValueError(
                f"--{name} --: must have a value"
            )  # argparse drops this one before Python 3.13
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str | os.PathLike):
                check_text(name, os.fspath(text))
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", args.get("device", "auto")):
        raise ValueError(f"--device {args['device']}: must be auto, cpu, cuda or cuda:N")
    if not re.fullmatch("none|length|field:.+", args.get("curriculum", "none")):
        raise ValueError(f"--curriculum {args['curriculum']}: must be none, length or field:NAME")
    if "save_weight" in args:
        check_name("save_weight", args["save_weight"])
    if not args.get("ddp", True) and read_launch().world_size > 1:
        raise ValueError("started by torchrun as several processes but without --ddp: add --ddp")
    if {"dim", "n_layers", "use_moe"} <= args.keys():
        check_model(args)


def check_number(name: str, value: int | float) -> None:
    """ValueError: the number is none, or outside of BOUNDS."""
    least, most = BOUNDS.get(name, (-math.inf, math.inf))
    if not math.isfinite(value):
        must = "a finite number"
    elif value < least:
        must = "positive" if value <= 0 < least else f"{least:,} or more"
    elif value > most:
        must = f"at most {most:,}"
    else:
        return
    raise ValueError(f"--{name} {value}: must be {must}")


def check_text(name: str, text: str) -> None:
    """ValueError: no file could have this name, nor a log this line."""
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:
        data = b"\0"
    if b"\0" in data:
        raise ValueError(f"--{name} {text!r}: has a character that no text may hold")


def check_name(name: str, text: str) -> None:
    """ValueError: a file of this name would lie elsewhere than it should, or nowhere."""
    legible = re.sub(
        "[\udc80-\udcff]", "", text
    ).isprintable()  # without the bytes of an encoding that is not UTF-8
    if text in ("", ".", "..") or "/" in text or not legible:
        raise ValueError(
            f"--{name} {text!r}: must be a file's name, without a folder: --out_dir says where it"
            " lies"
        )
    if len(os.fsencode(text)) > 200:  # of 255, as other files are named after it
        raise ValueError(
            f"--{name} {text[:20]}...: has {len(os.fsencode(text))} bytes, a file's name may"
            " have 200"
        )


def check_model(args: dict) -> None:
    """ValueError: sizes that do not fit together, or blocks whose weights are larger than this
    machine's memory."""
    from model.lm import LMConfig  # here: scripts without a model do without torch
    from runtime.distributed.memory import GIB, machine_memory, matrix_count

    config = LMConfig.from_flags(args, vocab_size=1)  # that is the tokenizer's, and not yet known
    size, launched = 4 * matrix_count(config), read_launch()
    memory = machine_memory() * max(1, launched.world_size // launched.local_world_size)
    if size > memory > 0:
        shape = " ".join(f"--{name} {args[name]}" for name in ("dim", "n_layers"))
        moe = f" --n_experts {args['n_experts']}" if args["use_moe"] else ""
        need = (
            f"{size / GIB:,.0f} GiB of weights, more than the {memory / GIB:,.0f} GiB of memory"
            " here"
        )
        raise ValueError(f"{shape}{moe}: the model has {need}: take a smaller one")
