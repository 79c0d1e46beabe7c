"""What must be the same in all processes of a job, wherever they run."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.device import dtype_of
from runtime.distributed.replicas import assert_same_on_all_ranks
from runtime.folders import CODE, ROOT
from runtime.kernel_loader import package
from runtime.saving.identity import sample_hash

SOURCES = (".py", ".cpp", ".h")
# Flags that may differ from process to process: where things lie on a machine, and what is not
# about the curve.
LOCAL = (
    "config",
    "data_path",
    "tokenizer_dir",
    "chat_template",
    "cache_dir",
    "out_dir",
    "device",
    "num_workers",
    "report_to",
)


def assert_same_start(args) -> None:
    """Refuse to train with processes that were started with other code, data or flags.

    Raises:
        ValueError: on every rank; names the first difference and where it is.
    """
    if dist.is_initialized():
        assert_same_on_all_ranks(fingerprint(args.data_path, vars(args)))


def fingerprint(data_path: str | None, args: dict) -> dict[str, str]:
    """Name -> hash or value. Reads a few MB at most, however large the data is.

    Args:
        data_path: the file that is trained on.
        args: the flags; those in LOCAL may differ.
    """
    digest = hashlib.sha256()
    files = (
        path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES
    )
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    same = {"code": digest.hexdigest()[:16], "torch": torch.__version__}
    if isinstance(device := args.get("device"), torch.device):
        same["kernels"] = kernels_in_use(device, dtype_of(args.get("dtype"), device))
    if data_path is not None:
        same["data"] = sample_hash(Path(data_path))
    if args.get("tokenizer_dir"):
        same["tokenizer"] = sample_hash(Path(args["tokenizer_dir"]) / "tokenizer.json")
    if args.get("chat_template"):
        same["chat template"] = sample_hash(Path(args["chat_template"]))
    return same | {f"--{name}": str(value) for name, value in args.items() if name not in LOCAL}


def kernels_in_use(device: torch.device, dtype: str) -> str:
    """The kernels that a run in this process uses, which must be the same in all of its job."""
    kernels = package()
    if kernels is None:
        return "off"
    states = kernels.available(device, getattr(torch, dtype))
    return ", ".join(name for name, why in states.items() if not why) or "none in C++"
