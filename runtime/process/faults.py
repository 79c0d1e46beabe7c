"""What a script says about the error that ends it."""

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from runtime.launcher import read_launch
from runtime.process.errors import describe_error, is_usage_error

# What needs no traceback
ONE_LINE = (ValueError, OSError, FloatingPointError, dist.DistNetworkError)
# Where the ranks are that a collective has waited for: set by `heartbeat.start`
explain_timeout: Callable[[], str] | None = None


def report_fault(error: Exception) -> tuple[int | None, bool]:
    """Say on stderr what ends this process, in one line where that is enough.

    Returns:
        The code that says whether there is something to flush, None for an error whose traceback is
        to be shown; whether it is a usage error, which exits with 2.
    """
    if explain_timeout and is_timeout(error):
        text = explain_timeout()
        print(f"error: {text}", file=sys.stderr, flush=True)
        tell_launcher(error, text)
        return 1, False
    is_killed = is_of_reader(error) and not str(error).startswith("Caught")
    if not (is_killed or isinstance(error, ONE_LINE)):
        tell_launcher(error, "".join(traceback.format_exception(error)))
        return None, False
    if os.environ.get("MINIMIND_DEBUG"):
        traceback.print_exc()
    text = explain(error)
    if is_of_reader(error) or not is_quiet():
        print(f"error: {text}", file=sys.stderr, flush=True)
    tell_launcher(error, text)
    code = 1 if is_killed or isinstance(error, OSError | FloatingPointError) else 2
    return code, not is_killed and is_usage_error(error)


def is_quiet() -> bool:
    """Whether another process of this machine tells of the errors that all of them have."""
    try:
        return read_launch().local_rank > 0
    except ValueError:  # which is the error to tell of
        return False


def is_timeout(error: Exception) -> bool:
    """Whether it is gloo's, or a store's, for ranks that did not come."""
    texts = "(?i)timed out waiting|wait timeout"
    return isinstance(error, RuntimeError) and re.search(texts, str(error)) is not None


def tell_launcher(error: Exception, text: str) -> None:
    """Leave the error where torchrun looks for it. Its summary shows the earliest, in seconds.

    A rank that lost its connection fails in the same second as the one that broke it, hence the
    delay.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        lost = "onnection (closed|reset|refused)|Broken pipe"
        is_lost = isinstance(error, RuntimeError) and re.search(lost, str(error))
        when = int(time.time()) + (5 if is_lost else 0)
        with contextlib.suppress(OSError), open(path, "w") as file:
            extra = {"py_callstack": text, "timestamp": str(when)}
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def explain(error: Exception) -> str:
    """The error in one line, with what to do about a lost reader or a group that is not joined."""
    if is_of_reader(error):
        return explain_reader(str(error))
    text = describe_error(error)
    if not isinstance(error, dist.DistNetworkError):
        return text
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = "is that host reachable?"
    if "EADDRINUSE" in text:
        remedy = "the port is busy, choose another --master_port"
    return f"cannot join the process group at {address}: {remedy} ({text[:150]})"


def is_of_reader(error: Exception) -> bool:
    """Whether it is one of a process of --num_workers, and so of this rank alone."""
    return "DataLoader worker" in str(error)


def explain_reader(text: str) -> str:
    """What DataLoader says about a process of --num_workers, in one line."""
    # The last line of its traceback
    if raised := re.match(r"Caught .*\n\w+: (.*)", text, re.DOTALL):
        return " ".join(raised[1].split())
    ended = " ".join(text.split()).rstrip(".")
    return (
        f"a process that reads data ended: {ended}; where memory ran out take fewer --num_workers;"
        " --resume auto goes on from the last checkpoint"
    )
