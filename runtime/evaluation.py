"""Evaluation over all ranks: every row counts once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.preference_loss import METRICS
from runtime.parallel import data_world, is_fsdp, row_split, sum_over_ranks, unwrap


def evaluate(
    loss_of: Callable, model: nn.Module, dataset, rows, batch_size: int, autocast, device
) -> float:
    """Mean loss per supervised token of some rows; each counts once, whatever the number of ranks.

    Args:
        loss_of: (model, X, Y, loss_mask, doc_lens, device) -> (summed loss, auxiliary loss), as in
        training. rows: (n,) ids into the dataset, the same on every rank.
    """

    def sums_of(*args) -> tuple[Tensor]:
        return loss_of(*args)[:1]

    total = sum_over_rows(sums_of, model, dataset, rows, batch_size, autocast, device)[0]
    return total / int(dataset.supervised[rows].sum())


@torch.no_grad()
def sum_over_rows(
    sums_of: Callable, model: nn.Module, dataset, rows, batch_size: int, autocast, device
) -> list[float]:
    """Evaluate the model on some rows, each once, and add up over all ranks what `sums_of` says
    about its batches.

    Args:
        sums_of: (model, X, Y, loss_mask, doc_lens, device) -> scalar tensors, each a sum over the
        rows of the batch. rows: (n,) ids into the dataset, the same on every rank.
    """
    (rank, ranks), alone = data_world(), unwrap(model)
    alone.eval()
    sums = []
    for at in range(
        0, len(rows), batch_size * ranks
    ):  # the same number of passes on every rank, some without a row
        mine = rows[at + rank * batch_size : at + (rank + 1) * batch_size]
        with autocast:
            batch = dataset.collate([dataset[row] for row in mine], **row_split())
            sums.append([value.item() for value in sums_of(alone, *batch, device)])
    alone.train()
    for module in filter(
        is_fsdp, model.modules()
    ):  # zero2 keeps whole weights until a backward pass, here for ever
        module.reshard()
    return sum_over_ranks(*(sum(values) for values in zip(*sums, strict=True)))


def evaluate_pairs(loss_of: Callable, model: nn.Module, pairs, rows, *how) -> dict[str, float]:
    """METRICS of preference pairs as means over held-out ones: {"eval_loss", "eval_accuracy", ...}.

    Args:
        loss_of: (model, *batch, device) -> (METRICS summed over the pairs of the batch, auxiliary
        loss). rows: (n,) ids into the dataset `pairs`, the same on every rank.
        how: batch_size, autocast and device.
    """
    sums = sum_over_rows(lambda *args: loss_of(*args)[0], model, pairs, rows, *how)
    return {f"eval_{name}": value / len(rows) for name, value in zip(METRICS, sums, strict=True)}
