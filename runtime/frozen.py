"""A model that is only asked, beside the one that is trained: reference, teacher, reward model."""

from collections.abc import Callable

from torch import nn


def wrap_frozen(model: nn.Module, args, dtype: str, fill: Callable | None) -> nn.Module:
    """In evaluation mode, shared where the one that is trained is: ranks then call it equally often.

    Args:
        args, dtype, fill: as for `parallel.wrap`.
    """
    model.eval().requires_grad_(False)
    if fill is None:
        return model
    from runtime.distributed import wrapping

    return wrapping.share(model, args, dtype, fill, reshard=True)
