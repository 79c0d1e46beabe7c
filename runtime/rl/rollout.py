"""Rollouts: completions of prompts with their log-probabilities, and the batches made of them.

Ranks sample completions of different lengths, so nothing here talks to another rank while it
generates: a sharded model is copied whole first. What is sampled is a function of (seed, step,
prompt, sample) alone, not of the ranks or the batch.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.packing import Plan
from model.generate_batch import generate_batch
from model.lm import MiniMindLM
from model.weights import allocate
from runtime import parallel
from runtime.device import is_sharded, to_float64


@dataclass
class Rollout:
    """N completions, the samples of a prompt side by side; on the CPU, padded on the right."""

    prompt_ids: Tensor  # (N, P) int64
    prompt_lengths: Tensor  # (N,) int64
    completion_ids: Tensor  # (N, C) int64
    lengths: Tensor  # (N,) int64, tokens of each completion, its end token included
    log_probs: Tensor  # (N, C) float32, in the distribution it was sampled from, at temperature
    ended: Tensor  # (N,) bool; False: cut off at max_new_tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> tuple[Tensor, Tensor]:
        """A prompt and its completion, without padding."""
        prompt = self.prompt_ids[row, : self.prompt_lengths[row]]
        return prompt, self.completion_ids[row, : self.lengths[row]]


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

    def tokens_of(self, padded: Tensor) -> Tensor:
        """(N, C) of a rollout -> (K,), this pack's part of it."""
        mask = torch.arange(padded.size(1)) < self.lengths.unsqueeze(1)
        return padded[self.rows][mask]

    def put(self, values: Tensor, padded: Tensor) -> None:
        """The way back: write (K,) values to their positions in (N, C)."""
        mask = torch.arange(padded.size(1)) < self.lengths.unsqueeze(1)
        padded[self.rows[self.of], mask.nonzero()[:, 1]] = values.to(padded)


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


def whole_copy(model: nn.Module, plain: nn.Module | None) -> nn.Module:
    """The model to generate with: itself, or its copy, updated. All ranks call it.

    Args:
        model: a MiniMindLM, not wrapped in DDP; it may be sharded.
        plain: of `copy_to_generate`, where the model is sharded or compiled.
    """
    if plain is None:
        return model
    for p, whole in zip(model.parameters(), plain.parameters(), strict=True):
        p = p.detach().to(whole.device)
        whole.data.copy_(p.full_tensor() if is_sharded(p) else p)
    return plain


def copy_to_generate(model: MiniMindLM, device: torch.device) -> MiniMindLM:
    """A copy for `whole_copy`, of a model that is not wrapped yet, and may have no memory yet."""
    whole = copy.deepcopy(model).requires_grad_(False)
    if whole.lm_head.weight.is_meta:
        allocate(whole, device)
    return whole


@torch.no_grad()
def generate(
    model: MiniMindLM,
    prompts: list[list[int]],
    numbers: list[int],
    samples: int,
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    end: int,
    seed: int,
    step: int,
    autocast,
) -> Rollout:
    """Complete every prompt `samples` times.

    Args:
        model: as `whole_copy` returns it.
        prompts: token ids.
        numbers: of the prompts in the data: with seed and step they decide what is sampled.
        batch_size: prompts that are worked on at once.
        max_new_tokens: longest completion; both fit the model's max_seq_len.
        temperature: of the logits; 0 takes the likeliest token, with log_probs as at 1.
        end: the token that ends a completion.
    """
    if not prompts:
        return empty()
    training, device = model.training, model.lm_head.weight.device
    N = len(prompts) * samples
    keys = [[seed, step, number, sample] for number in numbers for sample in range(samples)]
    exact = to_float64(torch.zeros((), device=device)).device  # where there is float64
    uniform = draw_uniform(keys, max_new_tokens).to(exact)
    ids = torch.zeros(N, max_new_tokens, dtype=torch.int64, device=device)
    log_probs = torch.zeros(N, max_new_tokens, device=device)
    lengths, last = torch.zeros(2, N, dtype=torch.int64, device=device)

    def sampler(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        distribution = (logits / (temperature or 1.0)).log_softmax(dim=-1)  # (R, vocab)
        place = row.to(exact), position.to(exact)
        token = draw(distribution, uniform[place]) if temperature else distribution.argmax(-1)
        log_probs[row, position] = distribution.gather(1, token.unsqueeze(1)).squeeze(1)
        return token

    model.eval()
    with autocast:
        limits = [max_new_tokens] * len(prompts)
        tokens = generate_batch(model, prompts, limits, sampler, end, samples, batch_size)
        for row, position, token in tokens:
            ids[row, position], lengths[row], last[row] = token, position + 1, token
    model.train(training)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    return Rollout(
        prompt_ids=padded.repeat_interleave(samples, dim=0),
        prompt_lengths=prompt_lengths.repeat_interleave(samples),
        completion_ids=ids.cpu(),
        lengths=lengths.cpu(),
        log_probs=log_probs.cpu(),
        ended=(last == end).cpu(),
    )


def draw_uniform(keys: list[list[int]], count: int) -> Tensor:
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


def empty() -> Rollout:
    """The rollout of a rank that has no prompt."""
    ids, none = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return Rollout(ids, none, ids, none, torch.zeros(0, 1), none.bool())


# --------------------------------------------------------------------------------------------------
# Learning from it
# --------------------------------------------------------------------------------------------------


def pack(rollout: Rollout, rows: list[int]) -> Pack:
    """Some rows of a rollout as one forward pass; without rows a single token of padding."""
    none = torch.zeros(0, dtype=torch.int64)
    texts = [rollout.ids(row) for row in rows]
    doc_lens = [len(prompt) + len(completion) - 1 for prompt, completion in texts]
    at = []
    for end, (_, completion) in zip(np.cumsum(doc_lens, dtype=int), texts, strict=True):
        at.append(torch.arange(end - len(completion), end))
    inputs = [torch.cat(text)[:-1] for text in texts] or [torch.zeros(1, dtype=torch.int64)]
    lengths = torch.tensor([len(completion) for _, completion in texts], dtype=torch.int64)
    return Pack(
        rows=torch.tensor(rows, dtype=torch.int64),
        X=torch.cat(inputs).unsqueeze(0),
        doc_lens=doc_lens,
        at=torch.cat([none, *at]),
        targets=torch.cat([none, *(completion for _, completion in texts)]),
        of=torch.arange(len(rows)).repeat_interleave(lengths),
        lengths=lengths,
        kept={},
    )


def packs_of(rollout: Rollout, rows: list[int], budget: int) -> list[Pack]:
    """Rows in their order, packed into passes of at most `budget` tokens, or of a longer row."""
    packs = []
    room = 0
    for row in rows:
        size = int(rollout.prompt_lengths[row] + rollout.lengths[row]) - 1
        if size > room:
            packs.append([])
            room = budget
        packs[-1].append(row)
        room -= size
    return [pack(rollout, rows) for rows in packs]


def mini_batches(rollout: Rollout, rows: list[list[int]], budget: int) -> list[MiniBatch]:
    """Each list of this rank's rows as its part of a mini-batch. All ranks call it together.

    Every rank makes the same number of passes, some without a row, and at least one.
    """
    local_packs = [packs_of(rollout, part, budget) for part in rows]
    counts = [[len(packs), *counts_of(packs)] for packs in local_packs]
    all_counts = np.array(parallel.gather_objects(counts))  # (ranks, mini-batches, 4)
    passes = all_counts.max(axis=0)[:, 0].tolist()
    sums = all_counts.sum(axis=0)[:, 1:].tolist()
    for packs, n in zip(local_packs, passes, strict=True):
        packs += [pack(rollout, []) for _ in range(max(1, n) - len(packs))]
    return [MiniBatch(packs, *total) for packs, total in zip(local_packs, sums, strict=True)]


def counts_of(packs: list[Pack]) -> list[int]:
    """Completions, tokens and tokens of completions in some packs."""
    each = [(len(p.rows), sum(p.doc_lens), len(p.targets)) for p in packs]
    return [sum(column) for column in zip(*each, strict=True)] or [0, 0, 0]


def rank_prompts(plan: Plan, window: int, rank: int, ranks: int) -> list[int]:
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
