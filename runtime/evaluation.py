"""Evaluation over all ranks: every row counts once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runtime.gradient_sync import is_fsdp
from runtime.parallel import data_world, row_split, sum_over_ranks, unwrap
from runtime.run import Run


def evaluate(run: Run, loss_of: Callable, dataset, rows) -> float:
    """Mean loss per supervised token of some rows, whatever the number of ranks.

    Args:
        loss_of: (model, X, Y, loss_mask, doc_lens, device) -> (summed loss, auxiliary loss), as in
            training.
        rows: (n,) ids into the dataset, the same on every rank.
    """

    def sums_of(*args) -> tuple[Tensor]:
        return loss_of(*args)[:1]

    total = sum_over_rows(run, sums_of, dataset, rows)[0]
    return total / int(dataset.supervised[rows].sum())


def evaluate_pairs(
    run: Run, loss_of: Callable, pairs, rows, names: Sequence[str]
) -> dict[str, float]:
    """Means over preference pairs: {"eval_loss", "eval_accuracy", ...}.

    Args:
        loss_of: (model, *batch, device) -> (metrics summed over the pairs, auxiliary loss).
        rows: (n,) ids into the dataset `pairs`, the same on every rank.
        names: of the metrics.
    """
    sums = sum_over_rows(run, lambda *args: loss_of(*args)[0], pairs, rows)
    return {f"eval_{name}": total / len(rows) for name, total in zip(names, sums, strict=True)}


def evaluate_prompts(sampler: Any, policy: nn.Module, numbers) -> dict[str, float]:
    """Mean reward of the most probable completions of some prompts: {"eval_reward", "eval_loss"}.

    Args:
        sampler: an `rl.sampler.Sampler`.
        policy: not wrapped in DDP; it may be sharded.
        numbers: (n,) of the prompts, the same on every rank.
    """
    rank, ranks = data_world()
    local_numbers = numbers[rank::ranks].tolist()
    _, rewards = sampler.sample_completions(policy, local_numbers, 1, 0, temperature=0.0)
    reward = sum_over_ranks(rewards.sum())[0] / len(numbers)
    return {"eval_loss": -reward, "eval_reward": reward}


@torch.no_grad()
def sum_over_rows(run: Run, sums_of: Callable, dataset, rows) -> list[float]:
    """Evaluate the model on some rows; sums over batches and ranks of what `sums_of` returns.

    Args:
        sums_of: (model, X, Y, loss_mask, doc_lens, device) -> scalar tensors, each a sum over the
            rows of the batch.
        rows: (n,) ids into the dataset, the same on every rank.
    """
    rank, ranks = data_world()
    batch_size, model = run.args.batch_size, unwrap(run.model)
    model.eval()
    sums = []
    # The same number of passes on every rank, some without a row
    for begin in range(0, len(rows), batch_size * ranks):
        first = begin + rank * batch_size
        local_rows = rows[first : first + batch_size]
        with run.autocast:
            batch = dataset.collate([dataset[row] for row in local_rows], **row_split())
            sums.append([value.item() for value in sums_of(model, *batch, run.args.device)])
    model.train()
    # zero2 keeps whole weights until a backward pass, here for ever
    for module in filter(is_fsdp, run.model.modules()):
        module.reshard()
    return sum_over_ranks(*(sum(values) for values in zip(*sums, strict=True)))
