"""DeepSpeed's engine around a model: start it, save and resume it, take whole weights out of it.

A checkpoint has DeepSpeed's own files, those that its `zero_to_fp32.py` reads, inside the house's
folder: it is there when it is whole (`runtime/saving/store.py`), and a run that goes on has as many
processes and the stage that it had.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import cpp_extension

from model.permissions import open_to_others
from runtime import checkpoint, parallel
from runtime.apple_gpu import needs_process_group
from runtime.engines.deepspeed_config import OFFLOADS, curve_settings, section
from runtime.engines.engine_store import seal
from runtime.engines.leftovers import forget_leftovers
from runtime.gradient_sync import one_order
from runtime.optim import make_optimizer
from runtime.ranks import gather_objects, world
from runtime.saving import safe_load, store
from runtime.saving.disk_errors import reason
from runtime.saving.resume import restore
from runtime.saving.validity import check_seen

TAG = "deepspeed"  # of a checkpoint inside its folder
LOUD = (
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
)


def prepare(device: torch.device, config: dict) -> None:
    """Have what is needed before data is read: DeepSpeed, a process group (also alone), compilers.

    Raises:
        ValueError: something is not installed; says how to get it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")
    needs_process_group(device, "DeepSpeed")
    root = extensions()
    for path in [root, *root.rglob("*.so")] if root.exists() else []:
        if open_to_others(path) or open_to_others(path.parent):
            raise ValueError(
                f"{path} can be written by others, and DeepSpeed would run it: chmod go-w, or"
                " delete it"
            )
    if not dist.is_initialized():
        if device.index:
            raise ValueError(
                f"--device {device}: DeepSpeed takes the first GPU that it sees; "
                f"set CUDA_VISIBLE_DEVICES={device.index} and take --device cuda"
            )
        forget_leftovers()
        os.environ["LOCAL_RANK"] = "0"
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string(os.environ.get("DEEPSPEED_LOG_LEVEL", "warning").lower())
    if (
        device.type == "cpu"
    ):  # no op is looked for: the one it would build, for a minute, is for inference alone
        deepspeed.ops.__compatible_ops__ = {}
    zero = section(config, "zero_optimization")
    if "nvme" in [section(zero, key).get("device") for key in OFFLOADS]:
        fine = not world()[0] and AsyncIOBuilder().is_compatible(verbose=False)
        if not gather_objects(fine)[0]:
            raise ValueError(
                "offload to nvme needs libaio, which DeepSpeed's async_io is built with: apt"
                " install libaio-dev, or say where it lies in CFLAGS and LDFLAGS"
            )


def extensions() -> Path:
    """Where torch keeps what DeepSpeed has compiled."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def shares_weights(config: dict) -> bool:
    """Whether processes share the weights from the start on: DeepSpeed moves those to disks later."""
    zero = section(config, "zero_optimization")
    on_disk = section(zero, "offload_param").get("device") == "nvme"
    return zero.get("stage") == 3 and world()[1] > 1 and not on_disk


@torch.no_grad()
def share_out(model: nn.Module, config: dict, fill, device: torch.device) -> None:
    """ZeRO 3: give a model without memory its values, of which each process keeps its part.

    One tensor at a time is whole.

    Args:
        fill: a `sharded_start.Fill`.
    """
    import deepspeed

    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}
    on = (kind for name, kind in wanted.items() if section(config, name).get("enabled"))
    dtype = next(on, torch.float32)
    parameters = dict(model.named_parameters())
    places: dict[int, list] = {}  # two of a tied matrix
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            places.setdefault(id(p), []).append((module, name))

    def share(name: str, value: Tensor) -> None:
        p = parameters.pop(name)
        shared = nn.Parameter(value.to(device, dtype), requires_grad=p.requires_grad)
        deepspeed.zero.Init(module=nn.ParameterList([shared]), config_dict_or_path=config)
        for module, leaf in places[id(p)]:
            setattr(module, leaf, shared)

    for name, write in fill.values():
        if name in parameters:
            value = torch.empty(parameters[name].shape)
            write(value, tuple(slice(0, size) for size in value.shape))
            share(name, value)
    for name, p in list(parameters.items()):  # a checkpoint brings the values
        share(name, torch.zeros(p.shape))


def start(model: nn.Module, config: dict, args, fill=None):
    """The engine around a model on its device, or with `fill` around one that has no memory yet.

    Args:
        config: as `deepspeed_config.fill` gives it.
        args: the flags learning_rate and weight_decay; without an optimizer in the file it is that
        of the other
            strategies: AdamW that decays matrices only, in DeepSpeed's own version where its state
            is offloaded.
    """
    import deepspeed
    from deepspeed.utils.logging import set_log_level_from_string

    deprecated = r"`torch.distributed.\w+` is deprecated"  # by torch, in DeepSpeed's calls
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    load_ops(config)
    if fill is not None:
        share_out(model, config, fill, args.device)
    zero = section(config, "zero_optimization")
    optimizer = None
    if "optimizer" not in config:
        ours = make_optimizer(model, "adamw", args.learning_rate, args.weight_decay)
        optimizer = torch.optim.AdamW(
            ours.param_groups, fused=True
        )  # DeepSpeed takes torch's own class, no other
        offloaded = section(zero, "offload_optimizer").get("device", "none") != "none"
        if offloaded and config.get("zero_force_ds_cpu_optimizer", True):
            optimizer = cpu_adam(optimizer)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=model.parameters(),
        config=config,
        dist_init_required=False,
    )
    assert (
        engine.zero_optimization_stage() == zero.get("stage", 0)
        and engine.dp_world_size == world()[1]
    )
    if any(config.get(key) for key in LOUD):  # what was asked for is told at this level
        set_log_level_from_string("info")
    return engine


def load_ops(config: dict) -> None:
    """Build what DeepSpeed wants in C++ for this file, which takes minutes, once.

    torch's lock around a build has no owner, and one that a killed build left would be waited for
    without end. Ours goes with the process that holds it.

    Raises:
        ValueError: it cannot be built.
    """
    from deepspeed.ops.op_builder import (
        AsyncIOBuilder,
        CPUAdamBuilder,
        FusedAdamBuilder,
        PinMemoryBuilder,
    )

    zero = section(config, "zero_optimization")
    devices = [section(zero, key).get("device", "none") for key in OFFLOADS]
    builders = [PinMemoryBuilder(), AsyncIOBuilder()] if "nvme" in devices else []
    if "optimizer" in config and not section(config["optimizer"], "params").get("torch_adam"):
        builders.append(FusedAdamBuilder() if devices[0] == "none" else CPUAdamBuilder())
    elif (
        "optimizer" not in config
        and devices[0] != "none"
        and config.get("zero_force_ds_cpu_optimizer", True)
    ):
        builders.append(CPUAdamBuilder())
    from filelock import FileLock

    root = extensions()
    for builder in builders:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".build_lock"):
            if not [*root.rglob(f"{builder.name}/*.so")]:
                print(
                    f"DeepSpeed's {builder.name} is built in {root}, once: this takes minutes",
                    flush=True,
                )
            for left in root.rglob(f"{builder.name}/lock"):
                left.unlink(missing_ok=True)
            try:
                builder.load(verbose=False)
            except (RuntimeError, OSError, ImportError, AssertionError) as error:
                why = " ".join(str(error).split())[:150]
                raise ValueError(
                    f"DeepSpeed's {builder.name} cannot be built, are g++ and ninja there? {why}"
                ) from None


def cpu_adam(like: torch.optim.AdamW) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for the CPU, with the groups and settings of another one."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = [
        {key: group[key] for key in ("params", "weight_decay")} for group in like.param_groups
    ]
    settings = {key: like.defaults[key] for key in ("lr", "betas", "eps")}
    return DeepSpeedCPUAdam(
        [group for group in groups if group["params"]], **settings, adamw_mode=True
    )


def one_exchange(engine, micro_batches: int) -> AbstractContextManager:
    """Around the micro-batches of an optimizer step: gradients are exchanged once, when it is left.

    Stages 0 and 1 do that anyway; 2 and 3 would exchange them in every backward pass.
    """
    several = engine.zero_optimization_stage() >= 2 and micro_batches > 1
    return engine.coalesce_grad_reduction() if several else nullcontext()


def backward(engine, loss: Tensor) -> None:
    """Gradients of a loss that is normalised already: DeepSpeed is not to divide it again.

    A loss that is not finite may have finite gradients; they become NaN, so that all ranks skip the
    step.
    """
    with one_order(loss.device):
        engine.backward(
            loss * torch.where(loss.detach().isfinite(), 1.0, math.nan), scale_wrt_gas=False
        )


def step(engine, max_norm: float) -> float:
    """Clip gradients to max_norm (0: no limit) and step; returns the norm before.

    Where that is not finite, on all ranks alike, nothing is changed and NaN is returned.
    """
    engine.set_gradient_accumulation_boundary(
        True
    )  # `one_exchange` has put back what was said before it
    if (
        engine.zero_optimization_stage() == 0
    ):  # DeepSpeed would neither tell the norm nor look at it
        (norm,) = parallel.agree_on_step(parallel.clip_gradients(engine.module, max_norm))
        if not math.isfinite(norm):
            engine.zero_grad()
            return math.nan
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan


def whole_weights(engine) -> dict[str, Tensor]:
    """Name -> float32 weights on the CPU, on rank 0; elsewhere empty. Every rank calls it.

    They are the optimizer's, not the module's, which are bfloat16 or float16 where training is.
    One tensor at a time is put together, so that no other process ever holds the whole model.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {}
    for name, p in engine.module.named_parameters():
        value = safe_get_full_fp32_param(p)
        value = p.data if value is None else value  # stage 0: no other copy
        if world()[0] == 0:
            whole[name] = (
                value.detach().view(getattr(p, "ds_shape", p.shape)).float().to("cpu", copy=True)
            )
    return whole


def describe(engine, args) -> str:
    """Size and layout, in a line."""
    sizes = (getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    places = {
        key: place
        for key, place in identity_of(args.deepspeed).items()
        if key in OFFLOADS and place != "none"
    }
    offload = "".join(f", {key} to {place}" for key, place in places.items())
    dtype = str(engine.get_data_types()[0]).removeprefix("torch.")
    layout = f"DeepSpeed ZeRO {engine.zero_optimization_stage()}{offload}"
    return f"{sum(sizes):,} parameters on {world()[1]} x {args.device.type}, {layout}, {dtype}"


def identity_of(config: dict) -> dict:
    """What else must be the same at a resume: DeepSpeed's files are those of its processes."""
    zero = section(config, "zero_optimization")
    offload = {key: section(zero, key).get("device", "none") for key in OFFLOADS}
    identity = {
        "the engine": "DeepSpeed",
        "ZeRO stage": zero.get("stage", 0),
        "processes": world()[1],
        **offload,
    }
    return identity | {
        "the settings of --deepspeed_config": json.dumps(curve_settings(config), sort_keys=True)
    }


def save_run(folder: Path, keep: int, engine, progress: dict, identity: dict) -> None:
    """Save a checkpoint of the whole run. Every rank calls it at the same step.

    Args: see `checkpoint.save_run`.

    Raises:
        OSError: it could not be written; those before it are intact.
    """
    checkpoint.wait()
    (rank, _), step, checkpoints = world(), progress["step"], folder / "checkpoints"
    place = nullcontext(checkpoints / f".tmp-step_{step:08d}")
    files: dict[str, dict] = {}
    if rank == 0:
        place = store.new_checkpoint(checkpoints, step, keep, files)
    try:
        with place as building:
            dist.barrier()
            engine.save_checkpoint(str(building), tag=TAG)
            paths = (p for p in building.rglob("*") if p.is_file() and writer_of(p) == rank)
            rank_files = {str(path.relative_to(building)): seal(path) for path in paths}
            for part in gather_objects(rank_files):
                files |= part
            rng = gather_objects(checkpoint.rng_state())
            if rank == 0:
                run = {"progress": progress, "identity": identity, "rng": rng}
                store.save_file(building / "run.pt", run)
                files["run.pt"] = store.describe(building / "run.pt")
                check_seen(building, files)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"cannot save the checkpoint of step {step} in {checkpoints}:"
            f" {reason(error)}; those before it are intact: make room and go on with"
            " --resume auto"
        ) from error


def writer_of(path: Path) -> int:
    """The rank that wrote a file of a checkpoint."""
    number = re.search(r"zero_pp_rank_(\d+)_|/offloaded_tensors/rank(\d+)/", str(path))
    return int(number[1] or number[2]) if number else 0


def finish(engine, run_dir: Path) -> None:
    """At the end of a run: weights in the precision of training if asked for, disks cleaned up."""
    if engine.zero_gather_16bit_weights_on_model_save():
        engine.save_16bit_model(str(run_dir))
    dist.barrier()
    if world()[0] == 0:  # what was offloaded to the default place
        shutil.rmtree(f"{run_dir}.nvme", ignore_errors=True)


def load_run(folder: Path | None, engine) -> dict:
    """Put a checkpoint back into engine and generators; returns the counters, zeros for a new run."""
    if folder is None:
        return restore(None)
    with safe_load.restricted(folder):
        if engine.zero_nvme_offload_optimizer():
            load_from_disks(engine, folder)
        elif engine.load_checkpoint(str(folder), tag=TAG)[0] is None:
            raise ValueError(f"there is no {TAG} folder with files for this rank")
    return restore(folder)


def load_from_disks(engine, folder: Path) -> None:
    """Put back a checkpoint of a run whose optimizer state is on NVMe.

    DeepSpeed brings back the files of the disk alone, and reads none for state that no step has
    made yet; it forgets how many steps were made, and all of a group of parameters that was too
    small for the disk.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0  # a step that makes the state and changes no weight
    engine.set_gradient_accumulation_boundary(True)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=engine.device)
    out = engine(
        tokens, doc_lens=[2], logits_at=torch.arange(2, device=engine.device), targets=tokens[0]
    )
    engine.backward((out.loss + out.aux_loss) * 0.0, scale_wrt_gas=False)
    step(engine, 0.0)
    engine.load_checkpoint(str(folder), tag=TAG)
    path = next((folder / TAG).glob(f"*zero_pp_rank_{world()[0]}_*_optim_states.pt"))
    saved = safe_load.load(path, "optimizer_state_dict")["optimizer_state_dict"]
    flats, states = (
        engine.optimizer.fp32_partitioned_groups_flat,
        saved["optimizer_state_dict"]["state"],
    )
    for number, (flat, its_weights) in enumerate(
        zip(flats, saved["fp32_flat_groups"], strict=True)
    ):
        state = engine.optimizer.optimizer.state[flat]
        state["step"] = states[number]["step"]
        if its_weights.numel():  # not on the disk
            flat.data.copy_(its_weights.data)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(states[number][key])
    # From there into the weights that the model computes with: partitions, and what every rank has
    # whole.
    engine.optimizer.checkpoint_event_prologue()
    engine.optimizer.reset_swap_buffers()
    engine.optimizer.checkpoint_event_epilogue()
