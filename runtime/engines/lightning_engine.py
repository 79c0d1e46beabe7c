"""PyTorch Lightning as the engine: its Trainer, strategies, loggers and progress bar."""

import functools
import importlib.util
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataset.packing import Plan, batches
from runtime import launch
from runtime.compilation import compiling
from runtime.engines.leftovers import forget_leftovers
from runtime.gradient_sync import is_fsdp
from runtime.launcher import read_launch
from runtime.optim import make_optimizer
from runtime.parallel import data_world, sync_gradients, world, wrap
from runtime.reporters import Reporters, wandb_reachable
from runtime.saving import safe_load
from runtime.tracking import Tracker


def check_launch(args) -> None:
    """What can be known before there is a process group; settles --strategy.

    Args:
        args: the flags ddp and strategy; 'auto' becomes 'ddp', or 'none' for one process.

    Raises:
        ValueError: Lightning is not installed, or the strategy cannot be had.
    """
    if importlib.util.find_spec("lightning") is None:
        raise ValueError(
            "this script needs PyTorch Lightning, which is not installed; pip install lightning"
        )
    if not args.ddp and args.strategy == "model_parallel":
        raise ValueError(
            "--strategy model_parallel shares over processes: add --ddp and start with torchrun"
        )
    if not args.ddp or args.strategy == "auto":
        args.strategy = "ddp" if args.ddp else "none"


def make_trainer(args, folder: Path, progress: dict, tracker: Tracker):
    """A Trainer for what is left of the run, in the process group that there is.

    What Lightning would do by itself is switched off where the script does it: precision (Lightning
    turns float16 into bfloat16 on a CPU), sampling (it would shuffle and shard), and files beside
    our checkpoints.

    Args:
        args: the flags device (a torch.device), strategy, bucket_cap_mb, report_to, use_wandb, and
        total_steps. folder: the run's.
        progress: counters, with `run_id`.
        tracker: leaves bar and loggers to Lightning; metrics.jsonl and the log stay its own.
    """
    tracker.report_to.clear()
    if tracker.bar is not None:
        tracker.bar.close()
        tracker.bar = None
    forget_leftovers()  # Lightning takes a LOCAL_RANK alone for a launch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    for name in ("lightning.pytorch", "lightning.fabric"):  # which devices it found, and tips
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message="`isinstance.treespec, LeafSpec.` is deprecated"
    )  # of torch, to it
    processes, here = world()[1], read_launch().local_world_size
    strategies = {
        "none": lambda: "auto",
        "ddp": lambda: DDPStrategy(bucket_cap_mb=args.bucket_cap_mb, gradient_as_bucket_view=True),
        "model_parallel": lambda: ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1
        ),
    }
    alone, cuda, bar = args.strategy == "none", args.device.type == "cuda", sys.stdout.isatty()
    trainer = Trainer(
        accelerator={"cuda": "gpu", "mps": "mps"}.get(args.device.type, "cpu"),
        devices=[args.device.index] if alone and cuda else here,
        num_nodes=processes // here,
        strategy=strategies[args.strategy](),
        plugins=(
            None if alone else [TorchElasticEnvironment()]
        ),  # processes are there: it must not start any
        precision="32-true",
        max_epochs=1,
        limit_train_batches=max(0, args.total_steps - progress["step"]),
        use_distributed_sampler=False,
        logger=make_loggers(args, folder, progress, tracker),
        enable_checkpointing=False,
        enable_progress_bar=bar,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar()] if bar else None,
        default_root_dir=folder,
    )
    trainer.strategy.load_checkpoint = restricted(trainer.strategy.load_checkpoint)
    return trainer


def restricted(load_checkpoint: Callable) -> Callable:
    """A strategy's way to read a checkpoint, which then builds nothing but data."""

    def load(checkpoint_path, *args, **options):
        with safe_load.restricted(checkpoint_path):
            return load_checkpoint(checkpoint_path, *args, **options)

    return load


def make_loggers(args, folder: Path, progress: dict, tracker: Tracker) -> list:
    """Lightning's loggers for what --report_to names; the run goes on without those that fail."""
    tracker.reporters = tracker.reporters or Reporters(set(), tracker.print)
    names = sorted({*args.report_to} - {"none"} | ({"wandb"} if args.use_wandb else set()))
    loggers = [
        tracker.reporters.attempt(name, make_logger, name, folder, progress, tracker)
        for name in names
    ]
    return [logger for logger in loggers if logger is not None]


def make_logger(name: str, folder: Path, progress: dict, tracker: Tracker):
    """A logger that is started, and none of whose calls by Lightning can end the run."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    if name == "tensorboard":
        logger = TensorBoardLogger(
            folder, name="tensorboard", version="", purge_step=progress["step"] + 1
        )
    else:
        online = world()[0] == 0 and (os.environ.get("WANDB_MODE") or wandb_reachable()) in (
            "online",
            True,
        )
        run = {
            "project": os.environ.get("WANDB_PROJECT", "minimind"),
            "name": folder.name,
            "id": progress["run_id"],
        }
        settings = {"silent": True, "init_timeout": 20}
        logger = WandbLogger(
            **run, save_dir=folder, offline=not online, resume="allow", settings=settings
        )
    _ = logger.experiment  # starts it
    for call in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize"):
        setattr(
            logger, call, functools.partial(tracker.reporters.attempt, name, getattr(logger, call))
        )
    return logger


def log(trainer, tracker: Tracker, metrics: dict) -> None:
    """A line of numbers, with `step`, to our files, to Lightning's loggers and its progress bar."""
    tracker.log(metrics)
    if "loss" in metrics:
        trainer.lightning_module.log("loss", metrics["loss"], prog_bar=True, logger=False)
    for logger in trainer.loggers:
        logger.log_metrics(
            {name: value for name, value in metrics.items() if name != "step"}, metrics["step"]
        )


def remaining(dataset, plans: Callable[[int], Plan], progress: dict, args) -> Iterator[tuple]:
    """The steps that are left of a run: (epoch, plan, window, micro-batches of this rank).

    Args:
        plans: epoch -> its plan.
        progress: counters at the start.
        args: the flags total_steps, batch_size and num_workers.
    """
    share, first, left = (
        (*data_world(), args.batch_size),
        progress["step_in_epoch"],
        args.total_steps - progress["step"],
    )
    for epoch in itertools.count(progress["epoch"]):
        if left <= 0:
            return
        plan = plans(epoch)
        windows = range(first, min(plan.steps, first + left))
        loader = batches(dataset, plan, windows, *share, args.num_workers)
        for window in windows:
            yield epoch, plan, window, [next(loader) for _ in plan.micro_batches(window, *share)]
        first, left = 0, left - len(windows)


def module_class() -> type:
    """LightningModule for a training_step that makes an optimizer step, with all micro-batches.

    Its training_step uses `sync_gradients`, and `stop`, the signal that came.
    """
    from lightning.pytorch import LightningModule

    class StepModule(LightningModule):
        def __init__(self, model: nn.Module, args, fill) -> None:
            super().__init__()
            self.model, self.args, self.automatic_optimization = model, args, False
            self.fill = fill
            self.stop = SimpleNamespace(number=0, received=0)

        def configure_model(self) -> None:
            if self.args.strategy == "model_parallel":
                options = {
                    "device": self.args.device,
                    "compile": self.args.compile,
                    "strategy": "zero3",
                    "offload": 0,
                }
                wrap(self.model, SimpleNamespace(**options), self.args.dtype, 0, self.fill)
            elif self.args.compile:
                compiling().compile_blocks(self.model)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(
                self.model, "adamw", self.args.learning_rate, self.args.weight_decay
            )

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch  # the loss moves what it needs

        def on_load_checkpoint(self, state: dict) -> None:
            del state[
                "loops"
            ]  # Lightning's counters, by which it would take an epoch for over; `remaining` has ours

        def on_train_start(self) -> None:
            check_wrapper(self.trainer, self.model)
            self.stop = (
                launch.StopSignal()
            )  # in place of Lightning's handler, which leaves without a checkpoint

        def sync_gradients(self, sync: bool) -> AbstractContextManager:
            """Around forward and backward: exchange gradients only where `sync` is true."""
            wrapper = self.trainer.model
            return sync_gradients(
                wrapper if isinstance(wrapper, DistributedDataParallel) else self.model, sync
            )

    return StepModule


def check_wrapper(trainer, model: nn.Module) -> None:
    """What Lightning made of the model is what was asked for.

    Raises:
        ValueError: it is something else.
    """
    strategy = type(trainer.strategy).__name__
    made = {"DDPStrategy": isinstance(trainer.model, DistributedDataParallel)}
    made |= {"ModelParallelStrategy": is_fsdp(model)}
    if trainer.world_size != world()[1] or not made.get(strategy, True):
        raise ValueError(
            f"{strategy} made a {type(trainer.model).__name__} on {trainer.world_size} processes"
        )
