"""The plan of an epoch: which rows every optimizer step, rank and micro-batch trains on.

The plan is a function of data, seed, epoch, max_seq_len, packing and curriculum alone. Optimizer
step s takes rows [s G, (s + 1) G) of it, G being the global batch; how many ranks and micro-batches
share that window changes nothing else. A row is a document, or with packing a pack of documents
that together have at most max_seq_len tokens.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset


@dataclass
class Plan:
    """One epoch, flat: its row i consists of the documents order[starts[i] : starts[i + 1]]."""

    order: np.ndarray  # (docs,) int64, document ids in the order of the epoch
    starts: np.ndarray  # (rows + 1,) int64
    tokens: np.ndarray  # (docs + 1,) int64, tokens before each place of `order`
    supervised: np.ndarray  # (docs + 1,) int64, tokens with loss before each place of `order`
    global_batch: int  # rows per optimizer step
    drop_last: bool  # leave out the last window where it is shorter

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch; the last window may be shorter, unless it is dropped."""
        whole, rest = divmod(self.rows, self.global_batch)
        return whole + bool(rest and not self.drop_last)

    def window(self, step: int) -> range:
        """The rows of an optimizer step."""
        return range(step * self.global_batch, min((step + 1) * self.global_batch, self.rows))

    def counts(self, step: int) -> tuple[int, int]:
        """(tokens, supervised tokens) of the whole window, over all ranks and micro-batches."""
        window = self.window(step)
        first, last = self.starts[window.start], self.starts[window.stop]
        tokens = self.tokens[last] - self.tokens[first]
        supervised = self.supervised[last] - self.supervised[first]
        return int(tokens), int(supervised)

    def size(self, step: int) -> int:
        """Documents of an optimizer step, over all ranks and micro-batches."""
        window = self.window(step)
        return int(self.starts[window.stop] - self.starts[window.start])

    def micro_batches(
        self, step: int, rank: int, world_size: int, batch_size: int
    ) -> list[list[int]]:
        """The document ids of each micro-batch of a rank, as many micro-batches on every rank."""
        rows = self.window(step)
        batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        if world_size > 1:
            from dataset.rank_rows import rank_batches

            sizes = np.diff(self.tokens[self.starts[rows.start : rows.stop + 1]]).tolist()
            batches = rank_batches(rows, sizes, rank, world_size, batch_size)
        return [[doc for row in rows for doc in self.documents(row)] for rows in batches]

    def documents(self, row: int) -> list[int]:
        return self.order[self.starts[row] : self.starts[row + 1]].tolist()


def split_rows(rows: int, eval_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Document ids for training and for evaluation, disjoint and both sorted.

    Raises:
        ValueError: nothing would be left to train on, or nothing to evaluate.
    """
    if not eval_ratio:
        return np.arange(rows), np.arange(0)
    from dataset.held_out import hold_out

    return hold_out(rows, eval_ratio, seed)


def plan_epoch(
    dataset: Dataset,
    documents: np.ndarray,
    seed: int,
    max_seq_len: int,
    packing: int,
    global_batch: int,
    drop_last: int,
    epoch: int,
) -> Plan:
    """Shuffle the documents, order them by their difficulty if they have one, and pack them.

    Packs are filled in that order and closed when the next document does not fit. Rows are never
    padded, so the room left in a pack costs nothing, and no search for a better fit could save
    anything.

    Args:
        dataset: has `lengths` and `supervised`, (all documents,) int64 token counts, and may have
            `difficulty`, (all documents,) numbers.
        documents: ids of the documents to train on.

    Raises:
        ValueError: the epoch has no step, as its only window is dropped.
    """
    order = documents[np.random.default_rng([seed, epoch]).permutation(len(documents))]
    difficulty = getattr(dataset, "difficulty", None)
    if difficulty is not None:
        from dataset.curriculum import easy_first

        order = easy_first(order, difficulty)
    lengths, supervised = dataset.lengths[order], dataset.supervised[order]
    starts = pack(lengths, max_seq_len) if packing else np.arange(len(order) + 1)
    sums = (np.concatenate([[0], np.cumsum(counts)]) for counts in (lengths, supervised))
    plan = Plan(order, starts, *sums, global_batch, bool(drop_last))
    if not plan.steps:
        fewer = f"are fewer than the global batch of {global_batch}"
        raise ValueError(f"--drop_last 1: {plan.rows} rows an epoch {fewer}")
    return plan


def pack(lengths: np.ndarray, max_seq_len: int) -> np.ndarray:
    """Where packs begin, (packs + 1,) int64; one is full when the next document does not fit."""
    starts, room = [], 0
    for n, length in enumerate(lengths.tolist()):
        if length > room:
            starts.append(n)
            room = max_seq_len
        room -= length
    return np.array([*starts, len(lengths)], np.int64)


def batches(
    dataset: Dataset,
    plan: Plan,
    steps: range,
    rank: int,
    world_size: int,
    batch_size: int,
    num_workers: int,
    split: dict | None = None,
) -> Iterator:
    """The micro-batches of a rank over some optimizer steps, as `dataset.collate` makes them.

    Args:
        steps: windows of the plan.
        num_workers: processes that read ahead; 0 reads in this one.
        split: for `dataset.collate`, where processes share a row: part, parts and multiple.
    """
    documents = (
        docs for step in steps for docs in plan.micro_batches(step, rank, world_size, batch_size)
    )
    collate = functools.partial(dataset.collate, **(split or {}))
    if num_workers:
        from dataset.readers import read_ahead

        return read_ahead(dataset, documents, collate, num_workers)
    micro_batches = (collate([dataset[doc] for doc in docs]) for docs in documents)
    if not torch.cuda.is_available():
        return micro_batches
    return (
        tuple(x.pin_memory() if torch.is_tensor(x) else x for x in batch) for batch in micro_batches
    )
