"""How a stage script starts and ends: its command line, signals, exit codes."""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from runtime import checkpoint
from runtime.config import ROOT, config_to_argv
from runtime.device import keep_memory
from runtime.launcher import is_quiet, read_launch
from runtime.terminal import escape_unencodable

CODE = ("model", "dataset", "runtime", "trainer")  # folders whose files decide how a run goes
# Flags that may differ from process to process: where things lie on a machine, and what is not about the curve.
LOCAL = ("config", "data_path", "tokenizer_dir", "cache_dir", "out_dir", "device", "num_workers", "report_to")


def command_line(parser) -> list[str]:
    """What a stage script parses: the file of --config as flags, then the flags it was given, which win.

    Left out is the `--local_rank N` that some launchers add: the environment says the same.

    Args:
        parser: the ArgumentParser that knows the flags.

    Raises:
        ValueError: see `config.config_to_argv`.
    """
    argv, words = [], iter(sys.argv[1:])
    for word in words:
        if re.fullmatch("--local[-_]rank", word):
            next(words, None)
        elif not re.match("--local[-_]rank=", word):
            argv.append(word)
    return config_to_argv(argv, parser) + argv


POSITIVE = ("max_seq_len", "epochs", "batch_size", "accumulation_steps", "global_batch_size", "learning_rate",
            "tensor_parallel", "context_parallel", "pipeline_parallel", "bucket_cap_mb", "save_total_limit",
            "log_interval", "kl_temperature", "max_new_tokens", "temperature", "updates_per_rollout", "mini_batches",
            "ppo_epochs")  # fmt: skip
NOT_NEGATIVE = ("max_steps", "warmup_ratio", "weight_decay", "grad_clip", "num_workers", "save_interval",
                "replica_check", "eval_interval", "eval_ratio", "preview", "seed", "clip_low", "clip_high", "kl_beta",
                "kl_weight", "sample_interval")  # fmt: skip


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
    if not args.get("ddp", True) and read_launch().world_size > 1:
        raise ValueError("started by torchrun as several processes but without --ddp: add --ddp")
    if not re.fullmatch("none|length|field:.+", args.get("curriculum", "none")):
        raise ValueError(f"--curriculum {args['curriculum']}: must be none, length or field:NAME")
    for name, value in args.items():
        if name in POSITIVE and value is not None and not value > 0:
            raise ValueError(f"--{name} {value}: must be positive")
        if name in NOT_NEGATIVE and value is not None and not value >= 0:
            raise ValueError(f"--{name} {value}: must be 0 or more")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: must be a finite number")
        if name in ("warmup_ratio", "kl_weight") and value > 1:
            raise ValueError(f"--{name} {value}: must be 1 or less, it is a share")


class StopSignal:
    """Remembers a signal to stop, so that the loop can finish its step, save and leave. The second one ends at once.

    A first one does not, also where other ranks have said before that they stop: the launcher sends it to a rank that
    is still saving when another one has ended.

    It hears SIGTERM and SIGINT, and SIGHUP unless that is ignored, as under nohup. A terminal that is closed sends
    SIGHUP twice, by its shell and by the kernel.

    Attributes:
        number: the signal that came, 0 while none has.
    """

    def __init__(self) -> None:
        self.number = 0
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT, *([] if ignores_hangup() else [signal.SIGHUP])):
            signal.signal(number, self.receive)
        sys.stdout, sys.stderr = (OutlivingStream(stream) for stream in (sys.stdout, sys.stderr))

    def receive(self, number: int, frame: object) -> None:
        if self.received and number != signal.SIGHUP:
            os._exit(128 + number)
        self.received = True
        self.number = self.number or number

    def hear(self, elsewhere: float) -> None:
        """A signal to one rank is a signal to all. Args: elsewhere: sum of the numbers of all ranks."""
        self.number = self.number or (signal.SIGTERM if elsewhere else 0)


def ignores_hangup() -> bool:
    """Whether SIGHUP is not to end this process: nohup has it ignored.

    But torchrun listens to it also under nohup, passes it on, and kills what has not ended in its shut-down time.
    """
    from_torchrun = "SIGHUP" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "") and read_launch().launched
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not from_torchrun


class OutlivingStream:
    """A text stream of which nothing is raised when who reads it is gone, a terminal or a pipe: a run has to save."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Send all that is still to come to nowhere, also what Python flushes at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def run(main: Callable[[], int]) -> None:
    """Run a script's main and turn its end into an exit code.

    A ValueError is the user's to mend: one line (per machine), exit code 2. A full disk, gradients that are not finite
    any more, or a reader that was killed: one line, exit code 1. MINIMIND_DEBUG=1 shows their tracebacks. Anything else
    keeps its own. torchrun's summary names the rank whose error came first.
    """
    code = 1
    escape_unencodable()
    try:
        read_launch()  # whose errors are the first to tell
        keep_memory()
        code = main() or 0
        if dist.is_initialized():
            leave_together()
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, FloatingPointError, dist.DistNetworkError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            traceback.print_exc()
        if is_of_reader(error) or not is_quiet():
            print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        code = 1 if isinstance(error, OSError | FloatingPointError) else 2
        report(error, explain(error))
    except Exception as error:
        if is_of_reader(error) and not str(error).startswith("Caught"):  # it was killed
            print(f"error: {explain(error)}", file=sys.stderr, flush=True)
            report(error, explain(error))
        else:
            report(error, "".join(traceback.format_exception(error)))
            raise
    finally:
        if code == 1:
            checkpoint.rescue()
        if dist.is_initialized() and code != 1:  # after a fault the others may wait inside a collective
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.exit(code)


def leave_together() -> None:
    """Wait until all ranks are here: torchrun takes the first that a signal has stopped for one that failed, and gives
    those that still save half a minute."""
    with contextlib.suppress(RuntimeError):  # another one failed, and says so
        dist.barrier()


def report(error: Exception, text: str) -> None:
    """Leave the error where torchrun looks for it. Its summary shows the earliest, in whole seconds.

    A rank that lost its connection fails in the same second as the one that broke it, hence the delay.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        lost = isinstance(error, RuntimeError) and re.search("onnection (closed|reset|refused)|Broken pipe", str(error))
        when = int(time.time()) + (5 if lost else 0)
        with contextlib.suppress(OSError), open(path, "w") as file:
            extra = {"py_callstack": text, "timestamp": str(when)}
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def explain(error: Exception) -> str:
    """The error in one line; for a process group that cannot be joined or a reader that is lost, with what to do."""
    if is_of_reader(error):
        return explain_reader(str(error))
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistNetworkError):
        return text
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = "the port is busy, choose another --master_port" if "EADDRINUSE" in text else "is that host reachable?"
    return f"cannot join the process group at {where}: {remedy} ({text[:150]})"


def is_of_reader(error: Exception) -> bool:
    """Whether it is one of a process of --num_workers, and so of this rank alone."""
    return "DataLoader worker" in str(error)


def explain_reader(text: str) -> str:
    """What DataLoader says about a process of --num_workers, in one line."""
    if raised := re.match(r"Caught .*\n\w+: (.*)", text, re.DOTALL):  # the last line of its traceback
        return " ".join(raised[1].split())
    return (
        f"a process that reads data ended: {' '.join(text.split()).rstrip('.')}; where memory ran out take fewer "
        "--num_workers; --resume auto goes on from the last checkpoint"
    )


def fingerprint(data_path: str | None, args: dict) -> dict[str, str]:
    """What must be the same in all processes of a job, wherever they run: name -> hash or value.

    Reads a few MB at most, however large the data is.

    Args:
        data_path: the file that is trained on.
        args: the flags; those in LOCAL may differ from process to process.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    same = {"code": digest.hexdigest()[:16], "torch": torch.__version__}
    if data_path is not None:
        same["data"] = sample_hash(Path(data_path))
    if args.get("tokenizer_dir"):
        same["tokenizer"] = sample_hash(Path(args["tokenizer_dir"]) / "tokenizer.json")
    return same | {f"--{name}": str(value) for name, value in args.items() if name not in LOCAL}


def sample_hash(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """Hash of a file's length and of blocks spread evenly over it, the first and the last among them."""
    try:
        length = path.stat().st_size
        digest = hashlib.sha256(str(length).encode())
        with open(path, "rb") as file:
            for n in range(blocks):
                file.seek(max(0, length - size) * n // (blocks - 1))
                digest.update(file.read(size))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return digest.hexdigest()[:16]
