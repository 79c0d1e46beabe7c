"""Rollouts, which are completions of prompts, and the batches made of them to learn from."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import packing
from runtime import parallel


@dataclass
class Rollout:
    """N completions as token ids, the samples of a prompt side by side."""

    prompts: list[list[int]]  # what each of them completes
    completions: list[list[int]]  # with their end tokens
    ended: list[bool]  # False: cut off at max_new_tokens

    def __len__(self) -> int:
        return len(self.completions)


@dataclass
class Pack:
    """Completions behind their prompts in one row: a forward pass that predicts K tokens."""

    rows: Tensor  # (R,) int64, rows of the rollout
    X: Tensor  # (1, N) int64
    doc_lens: list[int]  # of prompt with completion, the last token left out
    at: Tensor  # (K,) int64, where in X the tokens of the completions are predicted
    targets: Tensor  # (K,) int64, these tokens
    of: Tensor  # (K,) int64, the position in `rows` of the completion of each
    lengths: Tensor  # (R,) int64, tokens of each completion
    kept: dict[str, Tensor]  # what a stage keeps from one pass over the tokens to the next

    @property
    def counts(self) -> tuple[int, int, int]:
        """Completions, tokens of X, and tokens of completions."""
        return len(self.rows), sum(self.doc_lens), len(self.targets)


@dataclass
class MiniBatch:
    """What an optimizer step learns from."""

    packs: list[Pack]  # of this rank; as many on every rank
    completions: int  # over all ranks, as are the others
    tokens: int  # of X
    supervised: int  # of the completions


def pack(rollout: Rollout, rows: list[int]) -> Pack:
    """Some rows of a rollout as one forward pass; without rows a single token of padding."""
    completions = [rollout.completions[row] for row in rows]
    texts = [rollout.prompts[row] + rollout.completions[row] for row in rows]
    doc_lens = [len(text) - 1 for text in texts]
    lengths = [len(completion) for completion in completions]
    ends = accumulate(doc_lens)
    return Pack(
        rows=torch.tensor(rows, dtype=torch.int64),
        X=concat([text[:-1] for text in texts] or [[0]]).unsqueeze(0),
        doc_lens=doc_lens,
        at=concat(range(end - n, end) for end, n in zip(ends, lengths, strict=True)),
        targets=concat(completions),
        of=concat([position] * n for position, n in enumerate(lengths)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        kept={},
    )


def concat(parts: Iterable[Iterable[int]]) -> Tensor:
    """The numbers of all parts, one part behind the other: (n,) int64."""
    return torch.tensor([number for part in parts for number in part], dtype=torch.int64)


def packs_of(rollout: Rollout, rows: list[int], budget: int) -> list[Pack]:
    """Rows in their order, packed into passes of at most `budget` tokens, or of a longer row."""
    sizes = [len(rollout.prompts[row]) + len(rollout.completions[row]) - 1 for row in rows]
    starts = packing.pack(np.array(sizes, np.int64), budget)
    return [pack(rollout, rows[begin:end]) for begin, end in pairwise(starts)]


def mini_batches(rollout: Rollout, rows: list[list[int]], budget: int) -> list[MiniBatch]:
    """Each list of this rank's rows as its part of a mini-batch. All ranks call it together.

    Every rank makes the same number of passes, some without a row, and at least one.
    """
    local_packs = [packs_of(rollout, part, budget) or [pack(rollout, [])] for part in rows]
    counts = [
        [len(packs), *np.sum([pack.counts for pack in packs], axis=0)] for packs in local_packs
    ]
    all_counts = np.array(parallel.gather_objects(counts))  # (ranks, mini-batches, 4)
    passes = all_counts.max(axis=0)[:, 0].tolist()
    sums = all_counts.sum(axis=0)[:, 1:].tolist()
    for packs, n in zip(local_packs, passes, strict=True):
        packs += [pack(rollout, []) for _ in range(n - len(packs))]
    return [MiniBatch(packs, *total) for packs, total in zip(local_packs, sums, strict=True)]


def rank_prompts(plan: packing.Plan, window: int, rank: int, ranks: int) -> list[int]:
    """The prompts of a window that a rank completes: every ranks-th, as lengths are unknown yet."""
    return [prompt for row in plan.window(window)[rank::ranks] for prompt in plan.documents(row)]


def mini_batch_rows(
    prompts: int, window: int, rank: int, ranks: int, samples: int, parts: int
) -> list[list[int]]:
    """Which rows of this rank's rollout belong to each of `parts` mini-batches.

    A window of prompts is cut into `parts` runs of neighbours, whoever holds them: a rank has every
    ranks-th prompt.

    Args:
        prompts: of this rank.
        window: prompts of the rollout over all ranks.
    """
    rows = [[] for _ in range(parts)]
    for n in range(prompts):
        rows[(n * ranks + rank) * parts // window] += range(n * samples, (n + 1) * samples)
    return rows


def score(model: nn.Module, pack: Pack, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of a pack, see `log_probs_of`; the auxiliary loss."""
    device = next(model.parameters()).device
    out = model(pack.X.to(device), doc_lens=pack.doc_lens, logits_at=pack.at.to(device))
    return *log_probs_of(out.logits, pack.targets.to(device), temperature), out.aux_loss


def log_probs_of(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of its distribution, without gradient.

    Args:
        logits: (K, vocab) in any dtype.
        targets: (K,) int64.

    Returns:
        Two (K,) float32 tensors.
    """
    logits = logits.float() / temperature
    with torch.no_grad():
        distribution = logits.log_softmax(dim=-1)
        entropy = -(distribution.exp() * distribution).sum(dim=-1)
    return -F.cross_entropy(logits, targets, reduction="none"), entropy
