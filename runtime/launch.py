"""How a stage script starts and ends: its command line, signals, exit codes."""

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from runtime import checkpoint
from runtime.config import config_to_argv
from runtime.device import keep_memory
from runtime.distributed import heartbeat
from runtime.flags import check_flags, usage_error  # noqa: F401  # for the scripts
from runtime.launcher import is_quiet, read_launch
from runtime.terminal import describe_error, is_usage_error, prepare_streams


def command_line(parser) -> list[str]:
    """What a stage script parses: the file of --config as flags, then the flags it was given, which
    win.

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


class StopSignal:
    """Remembers a signal to stop, so that the loop can finish its step, save and leave. The second
    one ends at once.

    A first one does not, also where other ranks have said before that they stop: the launcher sends
    it to a rank that is still saving when another one has ended.

    It hears SIGTERM and SIGINT, and SIGHUP unless that is ignored, as under nohup. A terminal that
    is closed sends SIGHUP twice, by its shell and by the kernel.

    Attributes:
        received: the signal that came to this rank, 0 while none has.
        number: that which all ranks have agreed to stop by, 0 before: what a loop may end by.
    """

    def __init__(self) -> None:
        self.number = 0
        self.received = 0
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            *([] if ignores_hangup() else [signal.SIGHUP]),
        ):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        if self.received and number != signal.SIGHUP:
            os._exit(128 + number)
        self.received = self.received or number

    def sync_stop(self, received: float) -> None:
        """A signal to one rank is a signal to all. Args: received: sum of what all ranks have
        received."""
        self.number = self.number or (self.received or signal.SIGTERM if received else 0)


def ignores_hangup() -> bool:
    """Whether SIGHUP is not to end this process: nohup has it ignored.

    But torchrun listens to it also under nohup, passes it on, and kills what has not ended in its
    shut-down time.
    """
    from_torchrun = (
        "SIGHUP" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "") and read_launch().launched
    )
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not from_torchrun


ONE_LINE = (
    ValueError,
    OSError,
    FloatingPointError,
    dist.DistNetworkError,
)  # what needs no traceback


def run(main: Callable[[], int]) -> None:
    """Run a script's main and turn its end into an exit code.

    A ValueError is the user's to mend, and a file that is not there or cannot be written: one line
    (per machine), exit code 2. A full disk, gradients that are not finite any more, or a reader
    that was killed: one line, exit code 1. MINIMIND_DEBUG=1 shows their tracebacks. Anything else
    keeps its own. torchrun's summary names the rank whose error came first.
    """
    code, usage = 1, False
    prepare_streams()
    try:
        read_launch()  # whose errors are the first to tell
        keep_memory()
        code = main() or 0
        if dist.is_initialized():
            leave_together()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        killed = is_of_reader(error) and not str(error).startswith("Caught")
        if is_timeout(error) and (silent := heartbeat.explain_timeout()):
            print(f"error: {silent}", file=sys.stderr, flush=True)
            report(error, silent)
        elif killed or isinstance(error, ONE_LINE):
            if os.environ.get("MINIMIND_DEBUG"):
                traceback.print_exc()
            if is_of_reader(error) or not is_quiet():
                print(f"error: {explain(error)}", file=sys.stderr, flush=True)
            code = 1 if killed or isinstance(error, OSError | FloatingPointError) else 2
            usage = not killed and is_usage_error(error)
            report(error, explain(error))
        else:
            report(error, "".join(traceback.format_exception(error)))
            raise
    finally:
        if code == 1:
            checkpoint.flush_on_error()
        if code not in (1, 2):  # after a fault the silence of this rank tells the others
            heartbeat.stop()
        if (
            dist.is_initialized() and code != 1
        ):  # after a fault the others may wait inside a collective
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.exit(2 if usage else code)


def leave_together() -> None:
    """Wait until all ranks are here: torchrun takes the first that a signal has stopped for one
    that failed, and gives those that still save half a minute."""
    with contextlib.suppress(RuntimeError):  # another one failed, and says so
        dist.barrier()


def start_heartbeat(minutes: float) -> timedelta:
    """See `heartbeat.start`; how long a collective may wait. Args: minutes: --timeout."""
    return heartbeat.start(minutes, report)


def is_timeout(error: Exception) -> bool:
    """Whether it is gloo's, or a store's, for ranks that did not come."""
    return (
        isinstance(error, RuntimeError)
        and re.search("(?i)timed out waiting|wait timeout", str(error)) is not None
    )


def report(error: Exception, text: str) -> None:
    """Leave the error where torchrun looks for it. Its summary shows the earliest, in whole
    seconds.

    A rank that lost its connection fails in the same second as the one that broke it, hence the
    delay.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        lost = isinstance(error, RuntimeError) and re.search(
            "onnection (closed|reset|refused)|Broken pipe", str(error)
        )
        when = int(time.time()) + (5 if lost else 0)
        with contextlib.suppress(OSError), open(path, "w") as file:
            extra = {"py_callstack": text, "timestamp": str(when)}
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def explain(error: Exception) -> str:
    """The error in one line; for a process group that cannot be joined or a reader that is lost,
    with what to do."""
    if is_of_reader(error):
        return explain_reader(str(error))
    text = describe_error(error)
    if not isinstance(error, dist.DistNetworkError):
        return text
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = (
        "the port is busy, choose another --master_port"
        if "EADDRINUSE" in text
        else "is that host reachable?"
    )
    return f"cannot join the process group at {where}: {remedy} ({text[:150]})"


def is_of_reader(error: Exception) -> bool:
    """Whether it is one of a process of --num_workers, and so of this rank alone."""
    return "DataLoader worker" in str(error)


def explain_reader(text: str) -> str:
    """What DataLoader says about a process of --num_workers, in one line."""
    if raised := re.match(
        r"Caught .*\n\w+: (.*)", text, re.DOTALL
    ):  # the last line of its traceback
        return " ".join(raised[1].split())
    return (
        f"a process that reads data ended: {' '.join(text.split()).rstrip('.')}; where memory ran"
        " out take fewer --num_workers; --resume auto goes on from the last checkpoint"
    )


def fingerprint(data_path: str | None, args: dict) -> dict[str, str]:
    """What must be the same in all processes of a job: name -> hash or value; {} without others.

    Reads a few MB at most, however large the data is.

    Args:
        data_path: the file that is trained on.
        args: the flags; some may differ from process to process.
    """
    if not dist.is_initialized():
        return {}
    from runtime.distributed.fingerprint import fingerprint

    return fingerprint(data_path, args)
