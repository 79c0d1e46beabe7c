"""What makes a run this run: every flag that its curve depends on, and what is in their files.

A run that goes on is compared with what its checkpoint records, see `identity_changes`.
"""

import hashlib
import re
from pathlib import Path

from runtime.device import dtype_of

# No flags but kept beside them; device says with --dtype in which precision
DERIVED = {"total_steps", "peak_lr", "deepspeed", "shape", "device"}
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
    identity = {f"--{name}": value for name, value in flags.items() if name not in DERIVED}
    identity |= {f"{SHAPE}{name}": value for name, value in flags.get("shape", {}).items()}
    for name in ("from_weight", "teacher_weight", "critic_weight", "eval_data"):
        if flags.get(name):  # wherever they lie
            identity[f"--{name}"] = re.sub(r"(_\d+(_moe)?)?\.pth$", "", Path(flags[name]).name)
    contents = {name: flags.get(name) for name in ("data_path", "tokenizer_dir", "chat_template")}
    for word in flags.get("reward", ()):
        if file := re.match(r"(.+\.(?:py|pth))(?=:|$)", word):
            contents[f"reward {Path(file[1]).name}"] = file[1]
    for name, path in contents.items():
        if path:
            path = Path(path, "tokenizer.json" if name == "tokenizer_dir" else "")
            identity[f"the content of --{name}"] = sample_hash(path)
    if "reward" in flags:
        identity["--reward"] = [word.rpartition("/")[2] for word in flags["reward"]]
    if "dtype" in flags:
        identity["--dtype"] = dtype_of(flags["dtype"], flags["device"])
    if "peak_lr" in flags:
        identity["--learning_rate"] = flags["peak_lr"]
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
