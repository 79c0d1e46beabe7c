"""Where --report_to sends metrics: wandb and TensorBoard. Neither can end a run."""

import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path


class Reporters:
    """Those of a run. Whatever one raises, training goes on, without that one.

    Attributes:
        active: name -> reporter.
        failed: the names of those that raised something.
    """

    def __init__(self, names: set[str], tell: Callable[[str], None]) -> None:
        """Args: names: of those to start; tell: prints a line for people.

        Raises:
            ValueError: one is not installed.
        """
        for name in sorted(names):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"--report_to {name}: it is not installed; pip install {name}")
        self.names, self.tell = names, tell
        self.active: dict[str, Wandb | TensorBoard] = {}
        self.failed: set[str] = set()

    def attempt(self, name: str, function: Callable, *args, **options) -> object:
        """Call a function of a reporter, unless that has failed before."""
        if name in self.failed:
            return None
        try:
            return function(*args, **options)
        except Exception as error:
            self.failed.add(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.tell(f"warning: {name} failed, the run goes on without it: {reason}")
            return None

    def start(self, folder: Path, args: dict, progress: dict) -> None:
        """Begin to report, or go on.

        Args:
            folder: of the run.
            args: flags.
            progress: counters, with `step` and `run_id`.
        """
        for name in sorted(self.names):
            reporter = self.attempt(name, REPORTERS[name], folder, args, progress)
            if reporter is not None:
                self.active[name] = reporter

    def log(self, metrics: dict) -> None:
        for name, reporter in self.active.items():
            self.attempt(name, reporter.log, metrics)

    def close(self) -> None:
        for name, reporter in self.active.items():
            self.attempt(name, reporter.close)


class TensorBoard:
    """Events below the run's folder; what an interrupted run wrote behind `step` is not shown."""

    def __init__(self, folder: Path, args: dict, progress: dict) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=progress["step"] + 1)

    def log(self, metrics: dict) -> None:
        for name, value in values_of(metrics).items():
            self.writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A wandb run: online with a login and a network, else offline. Never asks or waits long."""

    def __init__(self, folder: Path, args: dict, progress: dict) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        options = {
            "project": os.environ.get("WANDB_PROJECT", "minimind"),
            "name": folder.name,
            "id": progress["run_id"],
            "dir": str(folder),
            "config": args,
            "resume": "allow",
            "settings": wandb.Settings(silent=True, init_timeout=20),
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_reachable() else "offline")
        try:
            self.run = wandb.init(mode=mode, **options)
        except Exception as error:  # whatever the service or the key does, training goes on
            print(f"wandb: {error}; logging offline", file=sys.stderr)
            self.run = wandb.init(mode="offline", **options)

    def log(self, metrics: dict) -> None:
        self.run.log(values_of(metrics), step=metrics["step"])

    def close(self) -> None:
        self.run.finish()


REPORTERS = {"wandb": Wandb, "tensorboard": TensorBoard}


def wandb_reachable() -> bool:
    """A key is known and the server answers."""
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
        return True
    except OSError:
        return False


def values_of(metrics: dict) -> dict:
    """The numbers of a line of metrics under names that UTF-8 can hold.

    A reward in a file whose name is no UTF-8 has a name that is not, and reporters refuse it.
    """
    return {
        name.encode("utf-8", "replace").decode("utf-8"): value
        for name, value in metrics.items()
        if name != "step" and value is not None
    }
