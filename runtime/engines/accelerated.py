"""Hugging Face Accelerate as the engine: it does what was asked for, or the run is refused.

What accelerate cannot do where it runs it leaves out without a word: several processes become one,
FSDP and DeepSpeed become DDP, float16 becomes float32. The loss curve then is the right one, so
only a check of what came out tells.

`Accelerator.prepare` takes a model with its values, so every process begins with all of it, whatever
it is then shared out by; `train_full_sft.py --strategy zero3` does not.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from runtime import parallel
from runtime.compilation import compiling
from runtime.device import dtype_of, to_float64
from runtime.engines import deepspeed_engine
from runtime.engines.leftovers import forget_leftovers
from runtime.gradient_sync import is_fsdp
from runtime.launcher import read_launch
from runtime.optim import make_optimizer
from runtime.parallel import world
from runtime.reporters import Reporters, wandb_reachable
from runtime.saving import safe_load
from runtime.saving.resume import restore
from runtime.tracking import Tracker

DTYPES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # our names, and accelerate's
STRATEGIES = ("ddp", "fsdp2", "deepspeed")
KINDS = {
    "NO": "none",
    "MULTI_CPU": "ddp",
    "MULTI_GPU": "ddp",
    "FSDP": "fsdp2",
    "DEEPSPEED": "deepspeed",
}


def env(name: str) -> str:
    """What `accelerate launch` says to its processes; '' where it says nothing."""
    return os.environ.get(f"ACCELERATE_{name}", "").lower().replace("false", "")


def asked_for(ddp: bool) -> str:
    """How the processes are to share the work: 'fsdp2', 'deepspeed', 'ddp' or 'none'."""
    if env("USE_FSDP"):
        return "fsdp2"
    if env("USE_DEEPSPEED"):
        return "deepspeed"
    return "ddp" if ddp else "none"


def format_of(ddp: bool) -> str:
    """Names the kind of files in a checkpoint; one process and DDP write the same."""
    return asked_for(ddp).replace("none", "ddp")


def check_launch(args) -> None:
    """Refuse what accelerate would take and not do, before a process group could hang.

    Args:
        args: the flags ddp, device, dtype, strategy, compile. `device` and `dtype` are set where
            they say nothing and accelerate's launcher does.

    Raises:
        ValueError: one line with the remedy.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            "this script needs Accelerate, which is not installed; pip install accelerate"
        )
    if not read_launch().launched and env("MIXED_PRECISION") and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does without"
            " as many GPUs; on CPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
            " trainer/engines/train_sft_accelerate.py --ddp"
        )
    kind = asked_for(args.ddp)
    if args.strategy not in ("auto", kind.replace("none", "ddp")):
        raise ValueError(
            f"--strategy {args.strategy}, but accelerate was started for {kind}: with --strategy"
            " auto its configuration decides, see configs/accelerate"
        )
    if kind in ("fsdp2", "deepspeed") and not args.ddp:
        raise ValueError(
            f"accelerate's configuration asks for {kind}, which shares over processes: add --ddp"
        )
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "accelerate's configuration asks for DeepSpeed, which is not installed; pip install"
            " deepspeed"
        )
    if kind == "fsdp2" and os.environ.get("FSDP_VERSION", "2") != "2":
        raise ValueError("accelerate's configuration asks for FSDP 1: write fsdp_version: 2")
    check_configuration()
    if env("USE_CPU") and args.device == "auto":
        args.device = "cpu"
    # The launcher says "no" also where nobody asked, so that much is left to --dtype.
    asked = {"fp16": "float16", "bf16": "bfloat16"}.get(
        env("MIXED_PRECISION"), env("MIXED_PRECISION")
    )
    if asked not in ("", "no") and (args.dtype or asked) != asked or asked == "fp8":
        raise ValueError(
            f"--dtype {args.dtype}, but accelerate launch says --mixed_precision"
            f" {env('MIXED_PRECISION')}"
        )
    args.dtype = args.dtype or (asked if asked in DTYPES else None)


def check_configuration() -> None:
    """ValueError: accelerate's configuration asks for what this script does not have."""
    for name in ("USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"):
        if env(name):
            raise ValueError(
                f"ACCELERATE_{name} is set: of accelerate's ways this script has DDP, FSDP2 and"
                " DeepSpeed"
            )
    if env("DYNAMO_BACKEND") not in ("", "no"):
        raise ValueError(
            "accelerate's configuration asks for torch.compile: leave it out and take --compile 1"
        )
    if env("GRADIENT_ACCUMULATION_STEPS") not in ("", "1", "auto"):
        raise ValueError(
            "accelerate's configuration has gradient_accumulation_steps: --accumulation_steps"
            " says it"
        )


def start(args, folder: Path):
    """The Accelerator of a run, in the process group that there is.

    It accumulates nothing by itself: the script says which micro-batch is the last of a window.

    Args:
        args: the flags device (a torch.device), ddp, batch_size, grad_clip, bucket_cap_mb,
            report_to, use_wandb, and dtype, which is set where it is None.
        folder: where its trackers write.

    Raises:
        ValueError: accelerate would do something else than was asked for.
    """
    forget_leftovers()  # accelerate takes a LOCAL_RANK alone for a launch
    import accelerate

    # Accelerate imports DeepSpeed where it finds it
    os.environ.setdefault("DS_ACCELERATOR", args.device.type)
    kind, cpu = asked_for(args.ddp), args.device.type == "cpu"
    args.dtype = dtype_of(args.dtype, args.device)
    if cpu and args.dtype == "float16":
        raise ValueError(
            "--dtype float16: accelerate would train in float32 on a CPU; take bfloat16 or float32"
        )
    if cpu and kind == "fsdp2":
        raise ValueError(
            "accelerate's configuration asks for FSDP2, on a CPU accelerate would make it DDP;"
            " without a GPU take train_full_sft.py --strategy zero3"
        )
    trackers = sorted({*args.report_to} - {"none"} | ({"wandb"} if args.use_wandb else set()))
    accelerator = accelerate.Accelerator(
        mixed_precision=DTYPES[args.dtype],
        gradient_accumulation_steps=1,
        cpu=cpu and kind != "deepspeed",
        log_with=trackers or None,
        project_config=accelerate.utils.ProjectConfiguration(
            str(folder), logging_dir=str(folder / "tensorboard")
        ),
        kwargs_handlers=handlers(kind, args),
    )
    actual = KINDS.get(accelerator.distributed_type.value)
    setup = f"{actual} on {accelerator.num_processes} x {accelerator.device.type}"
    wanted = f"{kind} on {world()[1]} x {args.device.type}"
    if setup != wanted:
        raise ValueError(f"asked for {wanted}, accelerate set up {setup}")
    if kind == "deepspeed":
        fill_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, args)
    return accelerator


def handlers(kind: str, args) -> list:
    """What accelerate is told about DDP, the scaler of float16 and DeepSpeed's backend."""
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
    )

    kwargs = [
        DistributedDataParallelKwargs(
            bucket_cap_mb=args.bucket_cap_mb, gradient_as_bucket_view=True
        ),
        GradScalerKwargs(init_scale=2.0**14),
    ]
    # Else DeepSpeed looks for a backend on its own, and on a CPU finds none: one process
    if kind == "deepspeed":
        deepspeed_engine.prepare(args.device, {})
        kwargs.append(InitProcessGroupKwargs(backend=dist.get_backend()))
    return kwargs


def fill_deepspeed(config: dict, args) -> None:
    """Write our flags into DeepSpeed's configuration. ValueError: it says something else."""
    ours = {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_accumulation_steps": 1}
    ours |= {"train_batch_size": args.batch_size * world()[1], "gradient_clipping": args.grad_clip}
    for name, value in ours.items():
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"accelerate's DeepSpeed configuration has {name} {config[name]}, the flags say"
                f" {value}"
            )
        config[name] = value


def prepare(accelerator, model: nn.Module, args) -> tuple:
    """(model, optimizer) as accelerate wraps them.

    Args:
        args: the flags ddp, compile, learning_rate and weight_decay.

    Raises:
        ValueError: the wrapper is not what was asked for.
    """
    if args.compile:
        compiling().compile_blocks(model)
    optimizer = make_optimizer(model, "adamw", args.learning_rate, args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    wrappers = {"DistributedDataParallel": "ddp", "DeepSpeedEngine": "deepspeed"}
    wrapped_for = "fsdp2" if is_fsdp(model) else wrappers.get(type(model).__name__, "none")
    if wrapped_for != asked_for(args.ddp):
        raise ValueError(
            f"accelerate was asked for {asked_for(args.ddp)} and prepared the model for {wrapped_for}"
        )
    register_plain_names(accelerator)
    return model, optimizer


def register_plain_names(accelerator) -> None:
    """Save weights without DDP's `module.`: a checkpoint loads on any number of processes."""

    def save(models: list, weights: list[dict], folder: str) -> None:
        weights[:] = [
            {name.removeprefix("module."): value for name, value in state.items()}
            for state in weights
        ]

    def load(models: list, folder: str) -> None:
        while models:
            state = safe_load.load(Path(folder) / "pytorch_model.bin")
            accelerator.unwrap_model(models.pop()).load_state_dict(state)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def clip_gradients(accelerator, model: nn.Module, max_norm: float) -> float:
    """Scale gradients to a global norm of at most max_norm (0: no limit); returns the norm before.

    Accelerate's clip_grad_norm_ sums in float32, which is off by 6e-5 on the CPU: it is ours, in
    float64. Only DeepSpeed has clipped already, and stepped, in the last backward pass, and is
    asked for what it found.
    """
    if accelerator.distributed_type.value == "DEEPSPEED":
        return float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
    accelerator.unscale_gradients()
    return parallel.clip_gradients(model, max_norm)


def step(accelerator, optimizer, finite: bool) -> None:
    """Update the weights, or where loss or gradients are not finite lower float16's scale alone.

    Raises:
        FloatingPointError: DeepSpeed has updated them already, which cannot be taken back.
    """
    if finite:
        optimizer.step()
    elif accelerator.distributed_type.value == "DEEPSPEED" and not optimizer.step_was_skipped:
        raise FloatingPointError(
            "DeepSpeed made a step with gradients that are not finite: go on from the last"
            " checkpoint with --resume auto and a lower --learning_rate"
        )
    elif accelerator.scaler is not None:
        accelerator.scaler.update(accelerator.scaler.get_scale() / 2)  # the same on all ranks


def whole_weights(accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the unwrapped model in float32, whole on rank 0. Every rank calls it."""
    if (
        accelerator.distributed_type.value == "DEEPSPEED"
    ):  # accelerate would gather the 16-bit copies
        weights = deepspeed_engine.whole_weights(model)
        embedding = weights.get(
            "model.embed_tokens.weight"
        )  # of tied weights the optimizer has one
        return (
            {name: weights.get(name, embedding) for name in model.module.state_dict()}
            if weights
            else {}
        )
    return accelerator.get_state_dict(model)


def start_trackers(accelerator, tracker: Tracker, progress: dict) -> None:
    """Begin, or go on with, accelerate's trackers for --report_to; `end_training` ends them.

    Args:
        tracker: of the run, which goes on without those that fail.
        progress: counters, with `run_id`.
    """
    tracker.reporters = tracker.reporters or Reporters(set(), tracker.print)
    asked, started = accelerator.log_with, []
    for name in asked:  # one by one, so that the others start where one fails
        accelerator.log_with, accelerator.trackers = [name], []
        tracker.reporters.attempt(
            str(name), start_tracker, accelerator, str(name), tracker.folder, tracker.args, progress
        )
        started += accelerator.trackers
    accelerator.log_with, accelerator.trackers = asked, started


def start_tracker(accelerator, name: str, folder: Path, args: dict, progress: dict) -> None:
    settings = {"tensorboard": {"purge_step": progress["step"] + 1}}
    if name == "wandb" and world()[0] == 0:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_reachable() else "offline")
        settings["wandb"] = {
            "mode": mode,
            "name": folder.name,
            "id": progress["run_id"],
            "dir": str(folder),
        }
        settings["wandb"] |= {"resume": "allow", "settings": {"silent": True, "init_timeout": 20}}
    config = {
        flag: value if isinstance(value, int | float) else str(value)
        for flag, value in args.items()
    }
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "minimind"), config, settings)


def log(accelerator, tracker: Tracker, metrics: dict) -> None:
    """A line of numbers, with `step`, to our files and to accelerate's trackers."""
    tracker.log(metrics)
    values = {name: value for name, value in metrics.items() if name != "step"}
    for board in accelerator.trackers:
        tracker.reporters.attempt(board.name, board.log, values, step=metrics["step"])


def end_training(accelerator, tracker: Tracker) -> None:
    """Close accelerate's trackers, and the process group."""
    for board in accelerator.trackers:
        tracker.reporters.attempt(board.name, board.finish)
    accelerator.trackers = []
    accelerator.end_training()


def load(accelerator, folder: Path | None) -> dict:
    """Put a checkpoint back into what was prepared; returns the counters, zeros for a new run."""
    if folder is not None:
        with safe_load.restricted(folder / "engine"):
            accelerator.load_state(str(folder / "engine"))
    return restore(folder)


def evaluation_loader(accelerator, rows: np.ndarray, batch_size: int) -> DataLoader | None:
    """Accelerate's share of the rows (n,): some are repeated so that all ranks have as many.

    None for no row.
    """
    if not len(rows):
        return None
    return accelerator.prepare(DataLoader(rows, batch_size=batch_size, generator=torch.Generator()))


@torch.no_grad()
def evaluate(
    accelerator, loss_of, model: nn.Module, dataset, loader: DataLoader, device: torch.device
) -> float:
    """Mean loss per supervised token; each row counts once: gather_for_metrics drops repeated ones.

    Args:
        loss_of: (model, X, Y, loss_mask, doc_lens, device) -> (summed loss, auxiliary loss), as in
            training.
        loader: from `evaluation_loader`.
    """
    model.eval()
    losses = []
    for rows in loader:
        # A loss for each, to drop it or not
        batches = [dataset.collate([dataset[row]]) for row in rows.tolist()]
        rank_losses = torch.stack([loss_of(model, *batch, device)[0] for batch in batches])
        losses.append(accelerator.gather_for_metrics(rank_losses))
    model.train()
    losses, rows = torch.cat(losses), loader.dataset
    assert len(losses) == len(rows), f"{len(losses)} losses of {len(rows)} rows"
    return to_float64(losses).sum().item() / int(dataset.supervised[rows].sum())
