"""Saving a run; what loads one is in `saving.resume`.

Tensors are saved under the names of the parameters, in the format of torch.distributed.checkpoint:
so a checkpoint loads under another strategy and on another number of processes. A save in the
middle of training copies the tensors and leaves the rest to `saving.background`.
"""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from runtime.device import is_sharded
from runtime.ranks import gather_objects, world
from runtime.saving import store
from runtime.saving.identity import identity_of
from runtime.saving.run_state import COUNTERS, rng_state, run_tensors
from runtime.saving.store import save_file, write_weights

__all__ = ["identity_of", "rng_state", "save_file", "write_weights"]

_state = {"beside": False}  # whether something is being written beside training


def save_run(
    folder: Path,
    keep: int,
    model,
    optimizer,
    scaler,
    progress: dict,
    identity: dict,
    own_tensors: bool = False,
) -> None:
    """Save a checkpoint of the whole run, in the middle of training beside it: see `wait`.

    Every rank calls it at the same step. Rank 0 writes what all ranks have; where the strategy
    shards, every rank writes its own.

    Args:
        folder: the run's, `out/full_sft_512`.
        keep: checkpoints that stay.
        progress: counters, with `step`.
        identity: what is compared at a resume, see `identity.identity_of`.
        own_tensors: ranks hold other tensors than rank 0, as in a pipeline; what several hold is
            written once.

    Raises:
        OSError: this save failed, or one before it that was written beside training.
    """
    wait()
    folder = folder / "checkpoints"
    tensors = run_tensors(model, optimizer)
    run = {"scaler": scaler.state_dict(), "progress": progress, "identity": identity}
    run["rng"] = gather_objects(rng_state())
    if dist.is_initialized():
        from runtime.distributed import sharded_save

        if sharded_save.is_needed(tensors, optimizer, own_tensors):
            submit(sharded_save.write, folder, keep, *sharded_save.snapshot(tensors, run))
            return
    if world()[0] != 0:
        return
    if progress["step"] < progress["total_steps"]:
        from runtime.saving import background

        submit(background.write, folder, keep, *background.snapshot(tensors, run))
    else:
        write(folder, keep, {name: tensor.cpu() for name, tensor in tensors.items()}, run)


def write(folder: Path, keep: int, tensors: dict[str, Tensor], run: dict) -> None:
    """Write a checkpoint that this process has all of. OSError: see `validity.raise_not_saved`."""
    step = run["progress"]["step"]
    try:
        with store.new_checkpoint(folder, step, keep) as building:
            store.write_tensors(building, tensors)
            save_file(building / "run.pt", run)
    except BaseException as error:
        from runtime.saving.validity import raise_not_saved

        raise_not_saved(folder, step, error)
        raise


def save_weights(path: Path, state_dict: dict[str, Tensor], config: str, part: str = "") -> None:
    """Save the weights as a plain state dict, with their configuration beside them.

    All ranks call it. They are written as the checkpoint of the `save_run` before this call is,
    now or beside training. Sharded tensors are read back from it: putting them together here would
    keep every rank from training.

    Args:
        path: of the weights, `out/full_sft_512.pth`.
        config: the JSON that goes beside it.
        part: of several models in one only that whose names begin so, without this beginning.
    """
    if world()[0] != 0:
        return
    names = [name for name in state_dict if name.startswith(part)]
    state_dict = {name.removeprefix(part): state_dict[name] for name in names}
    if any(map(is_sharded, state_dict.values())):
        from runtime.distributed import sharded_save

        shapes = {name: value.shape for name, value in state_dict.items()}
        submit(sharded_save.write_weights, path, shapes, part, config)
        return
    copied = {name: value.to("cpu", copy=True) for name, value in state_dict.items()}
    if _state["beside"]:
        submit(write_weights, path, copied, config)
    else:
        write_weights(path, copied, config)


def submit(job: Callable, *args) -> None:
    """Have job(*args) called beside training, behind everything that was submitted before."""
    from runtime.saving import background

    _state["beside"] = True
    background.submit(job, *args)


def wait() -> None:
    """Until all that was submitted is on the disk. The end of a run and the next save call it.

    Raises:
        OSError: something could not be written; says which checkpoint is still good.
    """
    if _state["beside"]:
        from runtime.saving import background

        _state["beside"] = False
        background.wait()


def find_run(
    folder: Path, source: str, identity: dict, accept: bool
) -> tuple[Path | None, dict[str, list]]:
    """The checkpoint that --resume (`source`) means and what differs from it; None for a new run.

    Raises:
        ValueError: see `resume.find_run`.
    """
    if source == "none":
        return None, {}
    from runtime.saving import resume

    return resume.find_run(folder, source, identity, accept)


def load_run(checkpoint: Path | None, model, optimizer, scaler) -> dict:
    """Put back a checkpoint, random generators too; returns its counters, zeros for a new run."""
    if checkpoint is None:
        return dict.fromkeys(COUNTERS, 0)
    from runtime.saving import resume

    return resume.load_run(checkpoint, model, optimizer, scaler)
