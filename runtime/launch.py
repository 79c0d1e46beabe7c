"""How a script starts and ends: its command line, signals, exit codes."""

import os
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from runtime.device import keep_memory
from runtime.flags import check_flags, usage_error  # noqa: F401  # for the scripts
from runtime.launcher import read_launch
from runtime.process.terminal import prepare_streams

# Flags that `command_line` takes out, or puts others in their place
NOT_OF_A_STAGE = {"--config", "--device_map", "--local_rank", "--local-rank"}


def command_line(parser) -> list[str]:
    """What a script parses: the file of --config as flags, then its own flags, which win.

    Args:
        parser: the ArgumentParser that knows the flags.

    Raises:
        ValueError: see `command_line.translate`.
    """
    argv = sys.argv[1:]
    if {word.split("=")[0] for word in argv}.isdisjoint(NOT_OF_A_STAGE):
        return argv
    from runtime.process import command_line

    return command_line.translate(argv, parser)


class StopSignal:
    """Remembers a signal to stop, so that the loop can finish its step, save and leave.

    The second one ends the process at once. A first one does not, also where other ranks have said
    before that they stop: the launcher sends it to a rank that is still saving when another one has
    ended. It hears SIGTERM and SIGINT, and SIGHUP unless that is ignored, as under nohup. A
    terminal that is closed sends SIGHUP twice, by its shell and by the kernel.

    Attributes:
        received: the signal that came to this rank, 0 while none has.
        number: that which all ranks have agreed to stop by, 0 before: what a loop may end by.
    """

    def __init__(self) -> None:
        self.number = 0
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, *hangup_signals()):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        """The handler of the signals."""
        if self.received and number != getattr(signal, "SIGHUP", None):
            os._exit(128 + number)
        self.received = self.received or number

    def sync_stop(self, received: float) -> None:
        """A signal to one rank is one to all. Args: received: the sum over all ranks."""
        if received and not self.number:
            self.number = self.received or signal.SIGTERM


def hangup_signals() -> list[int]:
    """[SIGHUP], or nothing where it is not to end this process: nohup has it ignored.

    Windows has no such signal. torchrun listens to it also under nohup, passes it on, and kills
    what has not ended in its shut-down time.
    """
    if not hasattr(signal, "SIGHUP"):
        return []
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    by_torchrun = "SIGHUP" in os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    return [] if is_ignored and not (by_torchrun and read_launch().launched) else [signal.SIGHUP]


def run(main: Callable[[], int]) -> None:
    """Run a script's main and turn its end into an exit code.

    A ValueError is the user's to mend, and a file that is not there or cannot be written: one line
    (per machine), exit code 2. A full disk, gradients that are not finite any more, or a reader
    that was killed: one line, exit code 1. MINIMIND_DEBUG=1 shows their tracebacks. Anything else
    keeps its own. torchrun's summary names the rank whose error came first.
    """
    code, is_usage = 1, False
    prepare_streams()
    try:
        read_launch()  # whose errors are the first to tell
        keep_memory()
        code = main() or 0
        if dist.is_initialized():
            from runtime.distributed import leaving

            leaving.wait_for_all()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        from runtime.process import faults

        code, is_usage = faults.report_fault(error)
        if code is None:
            code = 1
            raise
    finally:
        if code == 1:
            from runtime.saving import background

            background.flush_on_error()
        if dist.is_initialized():
            from runtime.distributed import leaving

            leaving.leave(code)
    sys.stdout.flush()
    sys.exit(2 if is_usage else code)
