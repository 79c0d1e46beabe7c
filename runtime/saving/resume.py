"""--resume: which checkpoint is meant, whether it is of the same run, and loading it."""

import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.device import local
from runtime.ranks import gather_objects, unwrap, world
from runtime.saving import safe_load, store
from runtime.saving.identity import LAST_STEP
from runtime.saving.identity_changes import check_identity
from runtime.saving.rotation import list_checkpoints
from runtime.saving.run_state import COUNTERS, parts_of, run_tensors
from runtime.saving.validity import fault

RUN = ("progress", "identity", "rng")  # what run.pt has, at least


# --------------------------------------------------------------------------------------------------
# Find
# --------------------------------------------------------------------------------------------------


def find_run(
    folder: Path, source: str, identity: dict, accept: bool
) -> tuple[Path | None, dict[str, list]]:
    """The checkpoint that `--resume` means, on every rank, and what differs from it.

    Args:
        folder: the run's, `out/full_sft_512`.
        source: the value of --resume, see `find`.
        identity: of the run that wants to go on.
        accept: --resume_with_changes: it may differ.

    Raises:
        ValueError: on every rank: no valid checkpoint, one of another run, or one that another node
            does not see.
    """
    checkpoint, changes, problem = None, {}, ""
    if world()[0] == 0:
        try:
            checkpoint, changes = find_same_run(folder, source, identity, accept)
        except ValueError as error:
            problem = str(error)
    checkpoint, changes, problem = gather_objects((checkpoint, changes, problem))[0]
    if problem:
        raise ValueError(problem)
    if checkpoint is not None:
        seen = gather_objects((checkpoint / store.MANIFEST).exists())
        if not all(seen):
            raise ValueError(
                f"--resume: rank {seen.index(False)} does not see {checkpoint}: --out_dir must lie"
                " on shared storage"
            )
    return checkpoint, changes


def find_same_run(
    folder: Path, source: str, identity: dict, accept: bool
) -> tuple[Path | None, dict[str, list]]:
    """`find_run` on rank 0."""
    checkpoint = find(folder / "checkpoints", source)
    if checkpoint is None:
        if source == "auto":
            refuse_other_shapes(folder)
        return None, {}
    run = safe_load.load(checkpoint / "run.pt", *RUN)
    last_step = run["progress"].get("total_steps", identity[LAST_STEP])
    saved = {LAST_STEP: last_step} | run["identity"]
    return checkpoint, check_identity(saved, identity, checkpoint, accept)


def find(folder: Path, source: str) -> Path | None:
    """The checkpoint that `--resume` means; says on stderr which newer ones are passed over.

    Args:
        folder: the run's own checkpoints folder.
        source: 'none', 'auto' (newest valid one in `folder`, None where none was ever saved), or
            the path of a checkpoint, of a `checkpoints` folder or of a run folder.

    Raises:
        ValueError: nothing at that path, or no checkpoint there is valid.
    """
    if source == "none":
        return None
    path = folder if source == "auto" else Path(source)
    if path.name == "latest" and not path.exists():
        path = path.parent
    if (path / store.MANIFEST).exists() or path.name.startswith("step_"):
        if problem := fault(path):
            raise ValueError(f"--resume {path}: {problem}")
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    skipped = []
    for checkpoint in list_checkpoints(path):
        if not (problem := fault(checkpoint)):
            if skipped:
                print("\n".join(skipped), file=sys.stderr, flush=True)
            return checkpoint
        skipped.append(f"checkpoint {checkpoint} is damaged and passed over: {problem}")
    if skipped:
        raise ValueError(f"--resume {source}: no valid checkpoint: " + "; ".join(skipped))
    if source != "auto":
        raise ValueError(f"--resume {source}: no checkpoint there")
    return None


def refuse_other_shapes(folder: Path) -> None:
    """Do not begin anew in silence where the same run lies under another --dim or --use_moe.

    Raises:
        ValueError: the same stage has checkpoints under another shape, and none under this one.
    """
    stage = re.sub(r"_\d+(_moe)?$", "", folder.name)
    for other in sorted(folder.parent.glob(f"{stage}_*/checkpoints")):
        name = other.parent.name
        if re.fullmatch(rf"{re.escape(stage)}_\d+(_moe)?", name) and list_checkpoints(other):
            raise ValueError(
                f"--resume auto: {folder} has no checkpoint, but {name} has: was that run meant"
                " (--dim, --use_moe)? For a new run beside it use --resume none or another"
                " --save_weight"
            )


# --------------------------------------------------------------------------------------------------
# Load
# --------------------------------------------------------------------------------------------------


def load_run(checkpoint: Path, model, optimizer, scaler) -> dict:
    """Put a checkpoint back, tensors and all; see `checkpoint.load_run`."""
    with safe_load.reading(checkpoint):
        load_tensors(safe_load.reader(checkpoint), model, optimizer)
    for name, tensor in run_tensors(model, optimizer).items():
        if not local(tensor).isfinite().all():
            fault = f"{name} has values that are not finite, so the model in it is broken"
            raise safe_load.NotData(f"{checkpoint}: {fault}")
    if dist.is_initialized():
        from runtime.distributed import sharded_save

        sharded_save.remember_newest(checkpoint)
    return restore(checkpoint, scaler)


def load_tensors(reader, model, optimizer) -> None:
    """Put the tensors of a checkpoint into the model and the optimizer, whose state they make."""
    import torch.distributed.checkpoint as dcp

    saved = reader.read_metadata().state_dict_metadata
    keys_of: dict[str, list[str]] = {}  # optimizer.NAME -> keys
    for entry in saved:
        prefix, _, key = entry.rpartition(".")
        keys_of.setdefault(prefix, []).append(key)
    for name, (p, state, options) in states_of(model, optimizer).items():
        for key in keys_of.get(f"optimizer.{name}", ()):
            like = saved[f"optimizer.{name}.{key}"]
            if like.size == p.shape:
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format).detach()
            else:  # a step counter, which a fused optimizer wants beside the parameter
                device = p.device if options.get("fused") else "cpu"
                state[key] = torch.zeros(like.size, dtype=like.properties.dtype, device=device)
    dcp.load(run_tensors(model, optimizer), storage_reader=reader, no_dist=True)


def states_of(model: nn.Module, optimizer) -> dict[str, tuple[Tensor, dict, dict]]:
    """Name -> (parameter, its optimizer state, its options), for what this process updates."""
    names = {p: name for name, p in unwrap(model).named_parameters()}
    states = {}
    for part in parts_of(optimizer):
        for group in part.param_groups:
            states |= {names[p]: (p, part.state[p], group) for p in group["params"]}
    return states


def restore(checkpoint: Path | None, scaler: torch.amp.GradScaler | None = None) -> dict:
    """Put back what is small in a checkpoint, scaler and generators; None for a new run.

    On another number of ranks the generators cannot be those of before; they then go on from the
    current seed.

    Returns:
        The counters that were saved, zeros for a new run.
    """
    if checkpoint is None:
        return dict.fromkeys(COUNTERS, 0)
    run = safe_load.load(checkpoint / "run.pt", *RUN)
    rank, world_size = world()
    with safe_load.reading(checkpoint / "run.pt"):
        if run.get("scaler") and scaler is not None and scaler.is_enabled():
            scaler.load_state_dict(run["scaler"])
        if len(run["rng"]) == world_size:
            set_rng_state(run["rng"][rank])
    return run["progress"]


def set_rng_state(state: dict) -> None:
    """Put back what `run_state.rng_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
