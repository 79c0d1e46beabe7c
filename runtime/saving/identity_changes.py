"""--resume compares the run with what its checkpoint records.

What differs is refused by name with both values, or accepted by --resume_with_changes. A new flag
is compared unless it stands among the HARMLESS.
"""

import re
from pathlib import Path

from runtime.saving.identity import LAST_STEP, ROWS, SHAPE

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
    "rope_scaling",  # a part of the shape
}
# What a checkpoint holds tensors or files for, or that is not used any more: no flag can change it
# in the same run.
FIXED = {
    *("--dim", "--n_layers", "--n_heads", "--n_kv_heads"),
    *("--use_moe", "--n_experts", "--n_shared_experts"),
    *("--optimizer", "--lora_rank", "--lora_targets", "--from_weight", "--critic_weight"),
    *("--tokenizer_dir", "the content of --tokenizer_dir"),
    *("the engine", "ZeRO stage", "processes", "offload_optimizer", "offload_param"),
}
FIXED_IN_AN_ENGINE = {"--weight_decay", "--dtype", "the settings of --deepspeed_config"}
# What the rows of --data_path become depends on these, too.
READ_BY = {
    *("--skip_bad", "--loss_on", "--max_seq_len", "--max_new_tokens", "--curriculum"),
    *("the content of --data_path", "the content of --tokenizer_dir"),
    "the content of --chat_template",
}
# Checkpoints of before: other names, and what it was where they have none. All else that they lack
# is not compared.
RENAMED = {"LoRA's base_sha256": "the weights of --from_weight"}
RENAMED |= {f"LoRA's {name}": f"--lora_{name}" for name in ("rank", "alpha", "dropout", "targets")}
UNRECORDED = {"--curriculum": "none", "the engine": None}


def changes_between(saved: dict, current: dict) -> dict[str, list]:
    """What differs between two identities, less what follows from it: name -> [before, now]."""
    saved = UNRECORDED | {RENAMED.get(name, name): value for name, value in saved.items()}
    current = UNRECORDED | current
    recorded = (saved.keys() & current.keys()) - {f"--{name}" for name in HARMLESS}
    changes = {
        name: [saved[name], current[name]]
        for name in sorted(recorded)
        if saved[name] != current[name]
    }
    # What is in a file counts, not its name; but by that one people know it.
    for name in recorded - {ROWS}:
        _, is_content, flag = name.partition(" of --")
        renamed = changes.pop(f"--{flag}", None) if is_content else None
        if renamed and name in changes:
            changes[name] = renamed
    if ROWS in recorded and ROWS not in changes:  # whatever the files hold, the same was made of it
        changes = {
            name: values
            for name, values in changes.items()
            if name not in READ_BY or name.startswith("--")
        }
    elif READ_BY & changes.keys():
        changes.pop(ROWS, None)
    if LAST_STEP in recorded and LAST_STEP not in changes:
        for name in ("--epochs", "--max_steps"):
            changes.pop(name, None)
    elif changes.keys() - {LAST_STEP}:
        changes.pop(LAST_STEP, None)
    return changes


def describe_changes(changes: dict[str, list]) -> str:
    """The changes in words, hashes shortened."""
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
    """Refuse to go on with another run, unless its changes are accepted; returns those.

    Args:
        saved, current: see `identity_of`; parts of a stage or an engine may have been added.
        source: the checkpoint, for the error.
        accept: --resume_with_changes.

    Raises:
        ValueError: names everything that differs with both values.
    """
    changes = changes_between(saved, current)
    fixed = changes.keys() & (FIXED | (FIXED_IN_AN_ENGINE if current.get("the engine") else set()))
    fixed |= {name for name in changes if name.startswith(SHAPE)}
    if not changes or accept and not fixed:
        return changes
    accepting = "" if fixed else ", or --resume_with_changes to go on with these"
    remedy = f"Use the flags it was started with{accepting}, or --resume none for a new run"
    if accept:
        remedy = f"--resume_with_changes cannot change {', '.join(sorted(fixed))}. {remedy}"
    if "--global_batch_size" in changes:
        batch = "--batch_size x --accumulation_steps x processes"
        remedy = f"Without --global_batch_size it is {batch}. {remedy}"
    differing = describe_changes(changes)
    raise ValueError(f"--resume {source}: this is another run: {differing}. {remedy}")
