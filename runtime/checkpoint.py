"""Saving a run while training goes on; what loads one is in `saving.resume`.

Tensors are saved under the names of the parameters, in the format of torch.distributed.checkpoint:
so a checkpoint loads under another strategy and on another number of processes. A save copies the
tensors and leaves the rest to a thread.
"""

import copy
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from runtime.device import is_sharded
from runtime.ranks import gather_objects, world
from runtime.saving import background, store
from runtime.saving.background import submit, wait
from runtime.saving.identity import identity_of
from runtime.saving.run_state import COUNTERS, copy_tensors, rng_state, run_tensors
from runtime.saving.store import save_file, write_weights

__all__ = ["identity_of", "rng_state", "save_file", "submit", "wait", "write_weights"]


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
    """Begin to save a checkpoint of the whole run; `wait` says how it went.

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
        OSError: the save before this one failed.
    """
    wait()
    folder = folder / "checkpoints"
    tensors = run_tensors(model, optimizer)
    background.state["rests"] = next(iter(tensors.values())).device.type == "cpu"
    run = {"scaler": scaler.state_dict(), "progress": progress, "identity": identity}
    run = copy.deepcopy(run) | {"rng": gather_objects(rng_state())}
    if dist.is_initialized():
        from runtime.distributed import sharded_save

        if sharded_save.is_needed(tensors, optimizer, own_tensors):
            sharded_save.submit_save(folder, keep, tensors, run)
            return
    if world()[0] == 0:
        submit(write, folder, keep, copy_tensors(tensors), run)


def write(folder: Path, keep: int, tensors: dict[str, Tensor], run: dict) -> None:
    """Write a checkpoint that this process has all of."""
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
    """Have the weights written as a plain state dict, their configuration beside them.

    All ranks call it. Sharded tensors are read back from the checkpoint of the `save_run` before
    this call: putting them together here would keep every rank from training.

    Args:
        path: of the weights, `out/full_sft_512.pth`.
        config: the JSON that goes beside it.
        part: of several models in one only that whose names begin so, without this beginning.
    """
    if world()[0] != 0:
        return
    names = [name for name in state_dict if name.startswith(part)]
    state_dict = {name.removeprefix(part): state_dict[name] for name in names}
    submit(save_file, path.with_suffix(".json"), config)
    if any(map(is_sharded, state_dict.values())):
        from runtime.distributed import sharded_save

        shapes = {name: value.shape for name, value in state_dict.items()}
        submit(sharded_save.write_weights, path, shapes, part)
    else:
        copied = {name: value.to("cpu", copy=True) for name, value in state_dict.items()}
        submit(write_weights, path, copied)


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
