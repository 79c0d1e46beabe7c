"""What makes a run this run: every flag that its curve depends on, and the content of the files
that they name.

A run that goes on is compared with what its checkpoint records. What differs is refused by name
with both values, or accepted by --resume_with_changes. A new flag is part of it unless it stands
among the HARMLESS.
"""

import hashlib
import re
from pathlib import Path

from runtime.device import dtype_of

# Flags that leave the curve as it is: names and places of what is written, what is told and when,
# and how the work is shared. Of batches only --global_batch_size counts, of learning rates the
# scaled one.
HARMLESS = {
    *("config", "cache_dir", "out_dir", "save_weight", "resume", "resume_with_changes", "preview"),
    *("save_interval", "save_total_limit", "log_interval", "eval_interval", "sample_interval"),
    *("use_wandb", "report_to", "num_workers", "replica_check", "timeout"),
    *("device", "ddp", "strategy", "tensor_parallel", "context_parallel", "pipeline_parallel"),
    *("pipeline_schedule", "offload", "bucket_cap_mb", "compile", "gradient_checkpointing"),
    *("batch_size", "accumulation_steps", "lr_scaling", "cache_reference"),
    "deepspeed_config",  # its settings are compared, see `deepspeed_engine.identity_of`
}
DERIVED = {"total_steps", "peak_lr", "deepspeed"}  # no flags, but kept beside them
# What a checkpoint holds tensors or files for, or that is not used any more: no flag can change it
# in the same run.
FIXED = {
    *(
        "--dim",
        "--n_layers",
        "--n_heads",
        "--n_kv_heads",
        "--use_moe",
        "--n_experts",
        "--n_shared_experts",
    ),
    *("--optimizer", "--lora_rank", "--lora_targets", "--from_weight", "--critic_weight"),
    *("--tokenizer_dir", "the content of --tokenizer_dir"),
    *("the engine", "ZeRO stage", "processes", "offload_optimizer", "offload_param"),
}
FIXED_IN_AN_ENGINE = {"--weight_decay", "--dtype", "the settings of --deepspeed_config"}
# What the rows of --data_path become depends on these, too.
READ_BY = {"--skip_bad", "--loss_on", "--max_seq_len", "--max_new_tokens", "--curriculum"}
READ_BY |= {f"the content of --{name}" for name in ("data_path", "tokenizer_dir")}
ROWS, LAST_STEP = "the data of --data_path", "the last step"
# Checkpoints of before: other names, and what it was where they have none. All else that they lack
# is not compared.
RENAMED = {"LoRA's base_sha256": "the weights of --from_weight"}
RENAMED |= {f"LoRA's {name}": f"--lora_{name}" for name in ("rank", "alpha", "dropout", "targets")}
UNRECORDED = {"--curriculum": "none", "the engine": None}


def identity_of(flags: dict, global_batch: int, rows_key: str) -> dict:
    """What makes a run this run: name -> plain value, as it takes effect.

    Args:
        flags: of the stage, with `peak_lr` and `total_steps`; `device` is a torch.device.
        global_batch: rows of an optimizer step.
        rows_key: `key` of the data set.
    """
    identity = {
        f"--{name}": value for name, value in flags.items() if name not in HARMLESS | DERIVED
    }
    for name in (
        "from_weight",
        "teacher_weight",
        "critic_weight",
        "eval_data",
    ):  # wherever they lie
        if flags.get(name):
            identity[f"--{name}"] = re.sub(r"(_\d+(_moe)?)?\.pth$", "", Path(flags[name]).name)
    for word in flags.get("reward", ()):
        if file := re.match(r"(.+\.(?:py|pth))(?=:|$)", word):
            identity[f"the content of --reward {Path(file[1]).name}"] = sample_hash(Path(file[1]))
    if "reward" in flags:
        identity["--reward"] = [word.rpartition("/")[2] for word in flags["reward"]]
    if "dtype" in flags:
        identity["--dtype"] = dtype_of(flags["dtype"], flags["device"])
    if "peak_lr" in flags:
        identity["--learning_rate"] = flags["peak_lr"]
    if "data_path" in flags:
        identity["the content of --data_path"] = sample_hash(Path(flags["data_path"]))
    if "tokenizer_dir" in flags:
        identity["the content of --tokenizer_dir"] = sample_hash(
            Path(flags["tokenizer_dir"]) / "tokenizer.json"
        )
    if "total_steps" in flags:
        identity[LAST_STEP] = flags["total_steps"]
    return identity | {"--global_batch_size": global_batch, ROWS: rows_key}


def changes_between(saved: dict, current: dict) -> dict[str, list]:
    """What differs between two identities, without what follows from something else: name ->
    [before, now]."""
    saved = {RENAMED.get(name, name): value for name, value in saved.items()}
    sides = [UNRECORDED | side for side in (saved, current)]
    recorded = sides[0].keys() & sides[1].keys()
    changes = {
        name: [side[name] for side in sides]
        for name in sorted(recorded)
        if sides[0][name] != sides[1][name]
    }
    for name in recorded - {
        ROWS
    }:  # what is in a file counts, not its name; but by that one people know it
        _, found, flag = name.partition(" of --")
        called = changes.pop(f"--{flag}", None) if found else None
        if called and name in changes:
            changes[name] = called
    if ROWS in recorded and ROWS not in changes:  # whatever the files hold, the same was made of it
        changes = {
            name: values
            for name, values in changes.items()
            if name not in READ_BY or name.startswith("--")
        }
    elif READ_BY & changes.keys():
        changes.pop(ROWS, None)
    if LAST_STEP in recorded and LAST_STEP not in changes:
        changes = {
            name: values
            for name, values in changes.items()
            if name not in ("--epochs", "--max_steps")
        }
    elif changes.keys() - {LAST_STEP}:
        changes.pop(LAST_STEP, None)
    return changes


def told(changes: dict[str, list]) -> str:
    """The changes in words."""
    texts = []
    for name, values in changes.items():
        before, now = (
            value[:12] if re.fullmatch("[0-9a-f]{16,}", str(value)) else value for value in values
        )
        texts.append(f"{name} was {before} and is {now}")
    return "; ".join(texts)


def check_identity(
    saved: dict, current: dict, source: Path, accept: bool = False
) -> dict[str, list]:
    """Refuse to go on with a run that is not the same run, unless its changes are accepted; returns
    those.

    Args:
        saved, current: see `identity_of`; parts of a stage or an engine may have been added.
        source: the checkpoint, for the error.
        accept: --resume_with_changes.

    Raises:
        ValueError: names everything that differs with both values.
    """
    changes = changes_between(saved, current)
    fixed = changes.keys() & (FIXED | (FIXED_IN_AN_ENGINE if current.get("the engine") else set()))
    if not changes or accept and not fixed:
        return changes
    accepting = "" if fixed else ", or --resume_with_changes to go on with these"
    remedy = f"Use the flags it was started with{accepting}, or --resume none for a new run"
    if accept:
        remedy = f"--resume_with_changes cannot change {', '.join(sorted(fixed))}. {remedy}"
    if "--global_batch_size" in changes:
        remedy = (
            "Without --global_batch_size it is --batch_size x --accumulation_steps x processes."
            f" {remedy}"
        )
    raise ValueError(f"--resume {source}: this is another run: {told(changes)}. {remedy}")


def sample_hash(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """Hash of a file's length and of blocks spread evenly over it, the first and the last among
    them."""
    try:
        if (
            path.exists() and not path.is_file()
        ):  # to open a pipe would wait for whoever writes to it
            return f"{path}: not a file"
        length = path.stat().st_size
        digest = hashlib.sha256(str(length).encode())
        with open(path, "rb") as file:
            for n in range(blocks):
                file.seek(max(0, length - size) * n // (blocks - 1))
                digest.update(file.read(size))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return digest.hexdigest()[:16]
