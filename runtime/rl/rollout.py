"""Rollouts: completions of prompts, and the batches made of them.

Ranks sample completions of different lengths, so nothing here talks to another rank while it
generates: a sharded model is copied whole first, see `whole_copy.py`. What is sampled is a function
of (seed, step, prompt, sample) alone, not of the ranks or the batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import packing
from model.generate import generate_batch
from model.lm import MiniMindLM
from runtime import parallel
from runtime.device import to_float64


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


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: MiniMindLM,
    prompts: list[list[int]],
    keys: list[tuple[int, int, int, int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    end: int,
    autocast,
) -> Rollout:
    """Complete every prompt, each as often as there are keys for it.

    Args:
        model: not wrapped in DDP, nor sharded.
        prompts: token ids.
        keys: (seed, step, prompt, sample) of each completion, whose random numbers follow from it.
        batch_size: prompts that are worked on at once.
        max_new_tokens: longest completion; both fit the model's max_seq_len.
        temperature: of the logits; 0 takes the likeliest token.
        end: the token that ends a completion.
    """
    if not prompts:
        return Rollout([], [], [])
    samples = len(keys) // len(prompts)
    training, device = model.training, model.lm_head.weight.device
    exact = to_float64(torch.zeros((), device=device)).device  # where there is float64
    uniform = draw_uniform(keys, max_new_tokens).to(exact)
    ids = torch.zeros(len(keys), max_new_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(len(keys), dtype=torch.int64, device=device)

    def sampler(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        log_probs = (logits / (temperature or 1.0)).log_softmax(dim=-1)  # (R, vocab)
        if not temperature:
            return log_probs.argmax(dim=-1)
        return draw(log_probs, uniform[row.to(exact), position.to(exact)])

    model.eval()
    with autocast:
        limits = [max_new_tokens] * len(prompts)
        tokens = generate_batch(model, prompts, limits, sampler, end, samples, batch_size)
        for row, position, token in tokens:
            ids[row, position], lengths[row] = token, position + 1
    model.train(training)
    completions = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        prompts=[prompt for prompt in prompts for _ in range(samples)],
        completions=completions,
        ended=[completion[-1] == end for completion in completions],
    )


def draw_uniform(keys: list[tuple], count: int) -> Tensor:
    """Random numbers in [0, 1) that follow from each row's key alone: (len(keys), count) float64."""
    return torch.from_numpy(np.stack([np.random.default_rng(key).random(count) for key in keys]))


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulated probability passes `uniform`.

    Args:
        log_probs: (B, V) float32.
        uniform: (B,) float64 in [0, 1).

    Returns:
        (B,) int64.

    Source: Devroye, Non-Uniform Random Variate Generation (1986), section III.2, inversion.
    """
    cumulated = to_float64(log_probs).exp().cumsum(dim=-1)
    point = uniform.unsqueeze(1) * cumulated[:, -1:]
    token = torch.searchsorted(cumulated, point, right=True).squeeze(1)
    return token.clamp_max(log_probs.size(1) - 1).to(log_probs.device)


# --------------------------------------------------------------------------------------------------
# Learning from it
# --------------------------------------------------------------------------------------------------


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
