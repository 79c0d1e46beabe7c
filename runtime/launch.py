"""How a stage script starts and ends: flags from YAML, signals, exit codes."""

import ctypes
import difflib
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

import torch.distributed as dist
import yaml

# The names that configuration files of other projects use for our flags.
ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "max_grad_norm": "grad_clip",
    "num_train_epochs": "epochs",
    "max_length": "max_seq_len",
    "save_steps": "save_interval",
    "logging_steps": "log_interval",
    "eval_steps": "eval_interval",
    "dataloader_num_workers": "num_workers",
    "resume_from_checkpoint": "resume",
    "distributed": "ddp",
    "distributed_strategy": "strategy",
}


def config_to_argv(argv: list[str], defaults: dict) -> list[str]:
    """The YAML file of `--config` as command-line flags, to stand before the real ones, which then win.

    The file maps flag names (or the names in ALIASES) to values; one level of sections such as `training:` is looked
    through.

    Args:
        argv: the command line, with or without `--config FILE`.
        defaults: all flags with their defaults, as `vars(parser.parse_args([]))` gives them.

    Raises:
        ValueError: no such file, broken YAML, or an unknown key, with the nearest known one.
    """
    at = next((n for n, flag in enumerate(argv) if flag.split("=")[0] == "--config"), None)
    if at is None:
        return []
    path = argv[at].partition("=")[2] or "".join(argv[at + 1 : at + 2])
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be a mapping of flags to values")
    flat: dict[str, object] = {}
    for key, value in content.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    flags = []
    for key, value in flat.items():
        name = ALIASES.get(key, key)
        if name not in defaults or name == "config":
            near = difflib.get_close_matches(str(key), [*defaults, *ALIASES], n=1, cutoff=0.0)
            raise ValueError(f"--config {path}: unknown key {key!r}; the nearest known one is {near[0]!r}")
        if isinstance(defaults[name], bool):  # a switch
            if not isinstance(value, bool | None):
                raise ValueError(f"--config {path}: {key} must be true or false, found {value!r}")
            flags += [f"--{name}"] if value else []
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            flags += [f"--{name}", str(int(value) if isinstance(value, bool) else value)]
    return flags


POSITIVE = ("max_seq_len", "epochs", "batch_size", "accumulation_steps", "global_batch_size", "learning_rate",
            "save_total_limit", "log_interval")  # fmt: skip
NOT_NEGATIVE = ("max_steps", "warmup_ratio", "weight_decay", "grad_clip", "num_workers", "save_interval",
                "eval_interval", "eval_ratio", "preview", "seed")  # fmt: skip


def usage_error(message: str) -> None:
    """What `parser.error` of a stage script is set to: the one line of `run`, without argparse's screen of usage."""
    raise ValueError(f"{message}; --help lists the flags")


def check_flags(args: dict) -> None:
    """Refuse values that make no sense.

    Raises:
        ValueError: names flag and value.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args["device"]):
        raise ValueError(f"--device {args['device']}: must be auto, cpu, cuda or cuda:N")
    for name, value in args.items():
        if name in POSITIVE and value is not None and not value > 0:
            raise ValueError(f"--{name} {value}: must be positive")
        if name in NOT_NEGATIVE and not value >= 0:
            raise ValueError(f"--{name} {value}: must be 0 or more")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: must be a finite number")
        if name == "warmup_ratio" and value > 1:
            raise ValueError(f"--{name} {value}: must be 1 or less, it is a share of the steps")


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can finish its step, save and leave. The second one ends at once.

    Attributes:
        number: the signal that came, 0 while none has.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number


def run(main: Callable[[], int]) -> None:
    """Run a script's main and turn its end into an exit code.

    A ValueError is the user's to mend: one line (per machine), exit code 2. A full disk, or gradients that are not
    finite any more: one line, exit code 1. MINIMIND_DEBUG=1 shows their tracebacks. Anything else keeps its own.
    """
    code = 1
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_launcher()
        code = main() or 0
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, FloatingPointError, dist.DistNetworkError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            traceback.print_exc()
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        code = 1 if isinstance(error, OSError | FloatingPointError) else 2
    finally:
        if dist.is_initialized() and code != 1:  # after a fault the others may wait inside a collective
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.exit(code)


def die_with_launcher() -> None:
    """Let the kernel end this process when torchrun is killed: an orphan would train on beside the run's successor."""
    launcher = os.getppid()
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux
    except (OSError, AttributeError):
        return
    if os.getppid() != launcher:  # it died while we asked
        os._exit(1)


def explain(error: Exception) -> str:
    """The error in one line; for a process group that cannot be joined, with what to do."""
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistNetworkError):
        return text
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = "the port is busy, choose another --master_port" if "EADDRINUSE" in text else "is that host reachable?"
    return f"cannot join the process group at {where}: {remedy} ({text[:150]})"
