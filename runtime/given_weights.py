"""The weights that a stage starts from: found, their shape, and a model with their values."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from model.config import LMConfig
from model.meta_device import on_meta_device
from model.tensor_file import read_tensors
from model.weights import allocate, is_path, load_weights, read_config


def find(name: str, of_stage: Path, required: bool) -> Path:
    """The weights that --from_weight names.

    Args:
        name: as for `start.find_weights`.
        of_stage: the file, if it is a stage.

    Raises:
        ValueError: they are not there, and required.
    """
    path = Path(name) if is_path(name) else of_stage
    if path.is_file():
        return path
    from runtime.other_weights import find_other

    return find_other(name, path, required)


def read_shape(path: Path | None) -> LMConfig | None:
    """The shape of the model in a weights file or folder; None: no weights, or nothing beside them.

    Raises:
        ValueError: it is damaged, or an adapter's.
    """
    if path is None or not (path.is_dir() or path.with_suffix(".json").is_file()):
        return None
    try:
        return read_config(path, reward=True)
    except ValueError:
        if not path.is_dir():
            read_tensors(path)  # where both are damaged, that of the weights is the error to tell
        raise


def read_shapes(
    path: Path | None, teacher: Path | None, args, suffix: str
) -> tuple[LMConfig | None, Path | None, LMConfig | None]:
    """The shape of the weights at `path`; the weights whose tokenizer is taken, and their shape.

    Those are the teacher where there are none at `path`. A run that goes on does without the
    weights that it began with: its own ones have their shape.

    Args:
        args, suffix: say what the run's own weights are called.
    """
    weights = read_shape(path)
    if path and not path.exists():
        from runtime.saving.own_weights import own_weights

        weights = read_shape(own_weights(args, suffix))
    if weights is None:
        return None, teacher, read_shape(teacher)
    return weights, path, weights


def check_sizes(shape: LMConfig, flags: dict[str, int], path: Path | None) -> None:
    """ValueError: flags of sizes contradict the weights at `path`."""
    for name, size in flags.items():
        have = getattr(shape, name)
        if size != have and (shape.use_moe or "expert" not in name):
            remedy = "leave the flag out, or start from other weights"
            raise ValueError(f"--{name} {int(size)}: {path} has {int(have)}; {remedy}")


def build(
    make: Callable, device: torch.device, path: Path | None, resumed: Path | None, shared: bool
) -> tuple[nn.Module, Callable | None]:
    """A model with the values of weights at `path`; arguments as for `start.Start.build`.

    Returns:
        The model and None. Where processes share it, it has no memory yet: `parallel.wrap` gives
        each its part, and what is returned here instead of None gives that part its values.
    """
    if shared:
        from runtime.distributed import sharded_start

        return sharded_start.build(make, path, resumed)
    with on_meta_device():  # the values come from elsewhere: none are made
        model = make()
    if resumed is None:
        load_weights(model, path, new_head=True, device=device)
    else:
        allocate(model, device)
    return model, None
