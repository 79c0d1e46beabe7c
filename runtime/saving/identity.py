"""What makes a run this run: every flag that its curve depends on, and what is in their files.

A run that goes on is compared with what its checkpoint records, see `identity_changes`. A new flag
is part of it unless it stands among the HARMLESS.
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
    "rope_scaling",  # a part of the shape
}
DERIVED = {"total_steps", "peak_lr", "deepspeed", "shape"}  # no flags, but kept beside them
SHAPE = "the model's "  # begins the names of what no flag says
ROWS = "the data of --data_path"
LAST_STEP = "the last step"


def identity_of(flags: dict, global_batch: int, rows_key: str) -> dict:
    """What makes a run this run: name -> plain value, as it takes effect.

    Args:
        flags: of the stage, with `peak_lr`, `total_steps` and what of the model's `shape` has no
            flag; `device` is a torch.device.
        global_batch: rows of an optimizer step.
        rows_key: `key` of the data set.
    """
    identity = {
        f"--{name}": value for name, value in flags.items() if name not in HARMLESS | DERIVED
    }
    identity |= {f"{SHAPE}{name}": value for name, value in flags.get("shape", {}).items()}
    for name in ("from_weight", "teacher_weight", "critic_weight", "eval_data"):
        if flags.get(name):  # wherever they lie
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
    if flags.get("tokenizer_dir"):
        tokenizer = Path(flags["tokenizer_dir"]) / "tokenizer.json"
        identity["the content of --tokenizer_dir"] = sample_hash(tokenizer)
    if flags.get("chat_template"):
        identity["the content of --chat_template"] = sample_hash(Path(flags["chat_template"]))
    if "total_steps" in flags:
        identity[LAST_STEP] = flags["total_steps"]
    return identity | {"--global_batch_size": global_batch, ROWS: rows_key}


def sample_hash(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """Hash of a file's length and of blocks spread evenly over it, first and last among them."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
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
