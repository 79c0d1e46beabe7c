"""A frozen model's log-probabilities of all preference pairs, computed once and kept on disk.

For --cache_reference 1: training then needs no second model in memory.
"""

import hashlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from dataset.preference_dataset import PreferenceDataset
from model.preference_loss import logps_of
from runtime.parallel import data_world, gather_objects, world
from runtime.saving.store import naming


class ReferencedPairs(Dataset):
    """Pairs, and with each batch of them what a frozen model says about it.

    Args:
        logps: (pairs, 2) float32: its log-probabilities of the chosen and of the rejected answers.
    """

    def __init__(self, pairs: PreferenceDataset, logps: np.ndarray):
        self.pairs, self.logps = pairs, torch.from_numpy(logps)
        self.key, self.lengths, self.supervised = pairs.key, pairs.lengths, pairs.supervised
        self.difficulty = pairs.difficulty

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> tuple:
        return self.pairs[row], self.logps[row]

    def collate(self, samples: list, **split) -> tuple:
        """As `PreferenceDataset.collate`, and the log-probabilities, (P, 2) float32."""
        logps = torch.stack([logps for _, logps in samples]) if samples else self.logps[:0]
        return *self.pairs.collate([pair for pair, _ in samples], **split), logps


def attach_reference(
    pairs: PreferenceDataset, model: nn.Module, args, autocast, dtype: str, weights: dict[str, str]
) -> ReferencedPairs:
    """The pairs, whose batches come with what the model says about them. Every rank calls it.

    Each pair is computed by one rank, once: the result stays beside the token cache.

    Args:
        model: the reference, of `frozen.wrap_frozen`.
        args: the flags batch_size and device, a torch.device.
        dtype: of the matrix products, the one of autocast.
        weights: what tells the model's weights from others.
    """
    key = f"{weights} {pairs.key} {dtype} {args.device.type} {torch.__version__}"
    name = f"reference_{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    path = pairs.folder.with_name(name)
    logps = gather_objects(load(path, len(pairs)) if world()[0] == 0 else None)[0]
    if logps is None:
        logps = compute(pairs, model, args, autocast)
        if world()[0] == 0:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with naming(temporary), open(temporary, "wb") as file:
                np.savez(file, logps=logps)  # a ZIP file, which has a checksum
            os.replace(temporary, path)
    return ReferencedPairs(pairs, logps)


@torch.no_grad()
def compute(pairs: PreferenceDataset, model: nn.Module, args, autocast) -> np.ndarray:
    """(pairs, 2) float32 on every rank: log-probabilities of the chosen and rejected answers."""
    rank, ranks = data_world()
    rows = range(rank, len(pairs), ranks)
    local_logps = [torch.empty(0, 2)]
    # The same number of passes on every rank, some without a row: ranks may share the model
    for begin in range(0, math.ceil(len(pairs) / ranks), args.batch_size):
        batch = pairs.collate([pairs[row] for row in rows[begin : begin + args.batch_size]])
        with autocast:
            local_logps.append(logps_of(model, *batch, args.device)[0].cpu())
    logps = np.empty((len(pairs), 2), np.float32)
    for other, part in enumerate(gather_objects(torch.cat(local_logps).numpy())):
        logps[other::ranks] = part
    return logps


def load(path: Path, pairs: int) -> np.ndarray | None:
    """The log-probabilities in a file; None without one, or where it is damaged, which is said."""
    try:
        with np.load(path) as file:
            logps = file["logps"]
        if logps.shape != (pairs, 2) or logps.dtype != np.float32:
            raise ValueError(f"{logps.shape} {logps.dtype} for {pairs} pairs")
        return logps
    except FileNotFoundError:
        return None
    except Exception as error:  # of numpy, zipfile and struct
        print(f"{path} is damaged ({error}): it is computed again", file=sys.stderr, flush=True)
        return None
