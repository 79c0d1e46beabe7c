"""The row of a micro-batch where processes share it, or where one of them has no document."""

import torch
from torch import Tensor


def collate_part(
    samples: list[tuple[Tensor, Tensor, Tensor]], part: int, parts: int, multiple: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One of the equal parts of the row that the samples make, laid one behind the other.

    Args:
        part, parts: which of how many parts to return.
        multiple: tokens of the row are a multiple of it. Only here is there ever padding: fewer
            than `multiple` tokens behind the last document, without loss. Without samples, of a
            rank that has no row in the last window but still takes part, there is padding alone.

    Returns:
        X, Y, loss_mask: (1, N / parts) int64 each.
    """
    tokens = sum(len(sample[0]) for sample in samples)
    padding = torch.zeros(-tokens % multiple if samples else multiple, dtype=torch.int64)
    rows = [torch.cat(tensors) for tensors in zip(*samples, (padding,) * 3, strict=True)]
    size = len(rows[0]) // parts
    X, Y, loss_mask = (row[part * size : (part + 1) * size].unsqueeze(0) for row in rows)
    return X, Y, loss_mask
