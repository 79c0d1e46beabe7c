"""What a checkpoint holds, and saving it while training goes on.

Tensors are saved under the names of the parameters (`optimizer.NAME.exp_avg` for what belongs to
one), and each process saves what it holds, in the format of torch.distributed.checkpoint: so a
checkpoint loads under another strategy and on another number of processes. A save copies the
tensors and leaves the rest to a thread, which takes its time.
"""

import copy
import random
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime import background, safe_load, store
from runtime.background import submit, throttle, wait
from runtime.device import is_sharded
from runtime.identity import LAST_STEP, check_identity, identity_of
from runtime.optim import Muon
from runtime.ranks import gather_objects, unwrap, world
from runtime.store import save_file

# Without a process group is what we mean.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)

__all__ = ["save_run", "find_run", "load_run", "submit", "wait", "save_file", "identity_of"]


RUN = ("progress", "identity", "rng")  # what run.pt has, at least
# The stager or the places of the copies, the process group of the writing thread
_shared: dict = {}


def flush_on_error() -> None:
    """In a process that is about to end with a fault: finish what it writes, if it needs no other
    process for that."""
    if "group" not in _shared:
        background.finish()


# --------------------------------------------------------------------------------------------------
# Save
# --------------------------------------------------------------------------------------------------


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
    """Begin to save a checkpoint of the whole run. Every rank calls it at the same step; `wait`
    says how it went.

    Rank 0 writes what all ranks have; where the strategy shards, every rank writes its own.

    Args:
        folder: the run's, `out/full_sft_512`.
        keep: checkpoints that stay.
        progress: counters, with `step`.
        identity: what `identity.check_identity` compares at a resume.
        own_tensors: ranks hold other tensors than rank 0, as in a pipeline; what several hold is
        written once.

    Raises:
        OSError: the save before this one failed.
    """
    wait()
    tensors = run_tensors(model, optimizer)
    background.share_cores(next(iter(tensors.values())).device.type == "cpu")
    sharded = own_tensors or is_sharded(next(iter(tensors.values())))
    sharded = sharded or any(hasattr(part, "optim") for part in parts_of(optimizer))
    run = {"scaler": scaler.state_dict(), "progress": progress, "identity": identity}
    run = copy.deepcopy(run) | {"rng": gather_objects(rng_state())}
    if sharded and "group" not in _shared:  # of its own: training uses the default one meanwhile
        _shared["group"] = dist.new_group(backend="gloo")
    if sharded or world()[0] == 0:
        submit(
            write,
            folder / "checkpoints",
            keep,
            copies(tensors),
            run,
            _shared["group"] if sharded else None,
        )


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, in the memory of the CPU; the place is the same at every
    save."""
    if any(map(is_sharded, tensors.values())):
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if "stager" not in _shared:
            _shared["stager"] = DefaultStager(StagingOptions(False, False, False, False))
        return _shared["stager"].stage(tensors)
    places = _shared.setdefault("places", {})
    for name, tensor in tensors.items():
        if name not in places:
            places[name] = torch.empty_like(tensor, device="cpu")
        places[name].copy_(tensor)
    return {name: places[name] for name in tensors}


def write(
    folder: Path, keep: int, tensors: dict[str, Tensor], run: dict, group: dist.ProcessGroup | None
) -> None:
    """Write a checkpoint: all processes of `group` together, or this one alone."""
    import torch.distributed.checkpoint as dcp  # here, as it takes a second
    from torch.distributed.checkpoint.api import CheckpointException

    class ThrottledPlanner(dcp.DefaultSavePlanner):
        def resolve_data(
            self, item
        ):  # is called for a tensor, or a part of one, before it is written
            throttle()
            return super().resolve_data(item)

    step, first = run["progress"]["step"], world()[0] == 0
    building = folder / f".tmp-step_{step:08d}"
    try:
        if first:
            store.begin(folder, step)
        if group is not None:
            dist.barrier(group)
        writer = dcp.FileSystemWriter(building)
        dcp.save(
            tensors,
            storage_writer=writer,
            planner=ThrottledPlanner(),
            process_group=group,
            no_dist=group is None,
        )
        mine = {
            path.name: store.describe(path, throttle) for path in building.glob(f"__{world()[0]}_*")
        }
        everyones = [None] * group.size() if group is not None and first else None
        if group is not None:
            dist.gather_object(mine, everyones, group=group)
        if first:
            save_file(building / "run.pt", run)
            files = {name: file for part in everyones or [mine] for name, file in part.items()}
            files |= {name: store.describe(building / name) for name in (".metadata", "run.pt")}
            _shared["newest"] = store.finish(building, step, files, keep)
    except (OSError, RuntimeError, CheckpointException) as error:
        if first:
            store.clean(folder)
        raise store.not_saved(folder, step, reason(error)) from error


def save_weights(path: Path, state_dict: dict[str, Tensor], config: str, part: str = "") -> None:
    """Have the weights written whole, as a plain state dict, and their configuration beside them;
    for all ranks.

    Sharded tensors are read back from the checkpoint of the `save_run` before this call: putting
    them together here would keep every rank from training.

    Args:
        path: of the weights, `out/full_sft_512.pth`.
        config: the JSON that goes beside it.
        part: of several models in one only that whose names begin so, without this beginning.
    """
    if world()[0] == 0:
        state_dict = {
            name[len(part) :]: value for name, value in state_dict.items() if name.startswith(part)
        }
        submit(save_file, path.with_suffix(".json"), config)
        if any(map(is_sharded, state_dict.values())):
            submit(
                write_saved_weights,
                path,
                {name: value.shape for name, value in state_dict.items()},
                part,
            )
        else:
            submit(
                write_weights,
                path,
                {name: value.to("cpu", copy=True) for name, value in state_dict.items()},
            )


def write_saved_weights(path: Path, shapes: dict[str, torch.Size], part: str) -> None:
    """Write the weights of the newest checkpoint; `part` as in `save_weights`."""
    import torch.distributed.checkpoint as dcp

    reader = safe_load.reader(_shared["newest"])
    saved = reader.read_metadata().state_dict_metadata
    whole = {f"model.{part}{name}": torch.empty(shape) for name, shape in shapes.items()}
    whole = {name: value for name, value in whole.items() if name in saved}
    dcp.load(whole, storage_reader=reader, no_dist=True)
    throttle()
    state_dict = {name: whole.get(f"model.{part}{name}") for name in shapes}
    if state_dict.get("lm_head.weight", ...) is None:  # tied: it has no entry of its own
        state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    write_weights(path, state_dict)


def write_weights(path: Path, state_dict: dict[str, Tensor]) -> None:
    """Write whole tensors of the CPU; a head that equals the embedding is tied to it, and is saved
    once."""
    head = state_dict.get("lm_head.weight")
    if head is not None and torch.equal(head, state_dict["model.embed_tokens.weight"]):
        state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    save_file(path, state_dict)


def reason(error: BaseException) -> str:
    """What went wrong, in a few words: torch wraps the OSError of a full disk in others."""
    if hasattr(error, "failures"):
        error = next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and (inner := error.__cause__ or error.__context__):
        error = inner
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def parts_of(optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that one consists of."""
    return list(optimizer.parts.values()) if isinstance(optimizer, Muon) else [optimizer]


def states_of(model: nn.Module, optimizer) -> dict[str, tuple[Tensor, dict, dict]]:
    """Name -> (parameter, its optimizer state, its options), for the parameters whose state this
    process holds."""
    names, found = {p: name for name, p in unwrap(model).named_parameters()}, {}
    for part in parts_of(optimizer):
        part = getattr(part, "optim", part)  # ZeroRedundancyOptimizer holds one for its share
        for group in part.param_groups:
            found |= {names[p]: (p, part.state[p], group) for p in group["params"]}
    return found


def run_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """Everything large that training changes: parameters under `model.NAME`, what the optimizer
    keeps for them under `optimizer.NAME.KEY`. Frozen parameters come from where they came from at
    the start."""
    tensors = {
        f"model.{name}": p.detach()
        for name, p in unwrap(model).named_parameters()
        if p.requires_grad
    }
    for name, (_, state, _) in states_of(model, optimizer).items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


# --------------------------------------------------------------------------------------------------
# Load
# --------------------------------------------------------------------------------------------------


def find_run(
    folder: Path, source: str, identity: dict, accept: bool
) -> tuple[Path | None, dict[str, list]]:
    """The checkpoint that `--resume` means, on every rank, None for a new run; and what differs
    from it.

    Args:
        folder: the run's, `out/full_sft_512`.
        source: the value of --resume, see `store.find`.
        identity: of the run that wants to go on.
        accept: --resume_with_changes: it may differ.

    Raises:
        ValueError: on every rank: no valid checkpoint, one of another run, or one that another node
        does not see.
    """
    found, changes, problem = None, {}, ""
    if world()[0] == 0:
        try:
            found = store.find(folder / "checkpoints", source)
            if found is None and source == "auto":
                store.refuse_other_shapes(folder)
            if found is not None:
                run = safe_load.load(found / "run.pt", *RUN)
                last = run["progress"].get("total_steps", identity[LAST_STEP])
                changes = check_identity(
                    {LAST_STEP: last} | run["identity"], identity, found, accept
                )
        except ValueError as error:
            problem = str(error)
    found, changes, problem = gather_objects((found, changes, problem))[0]
    if problem:
        raise ValueError(problem)
    if found is not None:
        blind = [
            rank
            for rank, sees in enumerate(gather_objects((found / store.MANIFEST).exists()))
            if not sees
        ]
        if blind:
            raise ValueError(
                f"--resume: rank {blind[0]} does not see {found}: --out_dir must lie on shared"
                " storage"
            )
    return found, changes


def load_run(found: Path | None, model, optimizer, scaler) -> dict:
    """Put a checkpoint back into the wrapped model, the optimizer, the scaler and the generators.

    Returns:
        The counters that were saved; zeros for a new run.
    """
    if found is None:
        return restore(None)
    _shared["newest"] = found  # where weights are read back from until this run saves
    with safe_load.reading(found):
        load_tensors(safe_load.reader(found), model, optimizer)
    return restore(found, scaler)


def load_tensors(reader, model, optimizer) -> None:
    """Put the tensors of a checkpoint into the model and the optimizer, whose state they make."""
    import torch.distributed.checkpoint as dcp

    saved = reader.read_metadata().state_dict_metadata
    for name, (p, state, options) in states_of(model, optimizer).items():
        for key in [
            key.rpartition(".")[2] for key in saved if key.rpartition(".")[0] == f"optimizer.{name}"
        ]:
            like = saved[f"optimizer.{name}.{key}"]
            if like.size == p.shape:
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format).detach()
            else:  # a step counter, which a fused optimizer wants beside the parameter
                device = p.device if options.get("fused") else "cpu"
                state[key] = torch.zeros(like.size, dtype=like.properties.dtype, device=device)
    dcp.load(run_tensors(model, optimizer), storage_reader=reader, no_dist=True)


def restore(found: Path | None, scaler: torch.amp.GradScaler | None = None) -> dict:
    """Put back what is small in a checkpoint, scaler and generators, and say so.

    On another number of ranks the generators cannot be those of before; they then go on from the
    current seed.

    Returns:
        The counters that were saved; zeros for a new run.
    """
    if found is None:
        return {
            "step": 0,
            "epoch": 0,
            "step_in_epoch": 0,
            "tokens": 0,
            "skipped": 0,
            "skipped_in_a_row": 0,
        }
    run = safe_load.load(found / "run.pt", *RUN)
    rank, world_size = world()
    with safe_load.reading(found / "run.pt"):
        if run.get("scaler") and scaler is not None and scaler.is_enabled():
            scaler.load_state_dict(run["scaler"])
        if len(run["rng"]) == world_size:
            set_rng_state(run["rng"][rank])
    if rank == 0:
        print(f"resumed from {found} behind step {run['progress']['step']}", flush=True)
    return run["progress"]


def rng_state() -> dict:
    """State of this rank's generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
