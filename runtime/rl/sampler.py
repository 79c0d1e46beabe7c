"""Sampling: completions of prompts, their rewards, and what the log says about them.

Ranks sample completions of different lengths, so nothing here talks to another rank while it
generates: a sharded model is copied whole first, see `whole_copy.py`. What is sampled is a function
of (seed, step, prompt, sample) alone, not of the ranks or the batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.prompt_coder import PromptCoder
from dataset.prompt_dataset import PromptDataset
from model.generate_batch import generate_batch
from model.lm import MiniMindLM
from runtime.device import to_float64
from runtime.parallel import sum_over_ranks
from runtime.rl.rewards import Reward, compute_rewards, texts_of
from runtime.rl.rollout import Rollout


@dataclass
class Sampler:
    """Samples completions from a policy, and computes their rewards."""

    args: Any  # the flags batch_size, max_new_tokens, temperature and seed
    rewards: list[Reward]  # of --reward
    dataset: PromptDataset
    autocast: Any  # around forward passes
    copy: nn.Module | None  # of `whole_copy.py`, where the policy is sharded or compiled

    def sample_completions(
        self,
        policy: nn.Module,
        numbers: list[int],
        samples: int,
        step: int,
        temperature: float | None = None,
    ) -> tuple[Rollout, Tensor]:
        """Complete this rank's prompts, and compute the rewards. All ranks call it together.

        Args:
            policy: not wrapped in DDP; it may be sharded.
            numbers: of the prompts in the dataset.
            samples: completions of each prompt.
            temperature: other than --temperature.

        Returns:
            The rollout, and its rewards (N, rewards), see `compute_rewards`.

        Raises:
            ValueError: see `compute_rewards`.
        """
        args, dataset = self.args, self.dataset
        if self.copy is not None:
            from runtime.rl.whole_copy import update_copy

            policy = update_copy(self.copy, policy)
        rollout = generate(
            policy,
            [dataset[n] for n in numbers],
            [(args.seed, step, n, sample) for n in numbers for sample in range(samples)],
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature if temperature is None else temperature,
            end=dataset.coder.end_of_turn,
            autocast=self.autocast,
        )
        sources = [n for n in numbers for _ in range(samples)]
        rows = [dataset.rows[n] for n in sources]
        places = [dataset.places[n] for n in sources]
        return rollout, compute_rewards(self.rewards, rollout, rows, places, dataset.coder)


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
    uniform = np.stack([np.random.default_rng(key).random(max_new_tokens) for key in keys])
    uniform = torch.from_numpy(uniform).to(exact)  # (N, max_new_tokens), of [0, 1)
    ids = torch.zeros(len(keys), max_new_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(len(keys), dtype=torch.int64, device=device)

    def sample_token(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        log_probs = (logits / (temperature or 1.0)).log_softmax(dim=-1)  # (R, vocab)
        if not temperature:
            return log_probs.argmax(dim=-1)
        return draw(log_probs, uniform[row.to(exact), position.to(exact)])

    model.eval()
    with autocast:
        limits = [max_new_tokens] * len(prompts)
        tokens = generate_batch(model, prompts, limits, sample_token, end, samples, batch_size)
        for row, position, token in tokens:
            ids[row, position], lengths[row] = token, position + 1
    model.train(training)
    completions = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        prompts=[prompt for prompt in prompts for _ in range(samples)],
        completions=completions,
        ended=[completion[-1] == end for completion in completions],
    )


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


def show_samples(rollout: Rollout, rewards: Tensor, coder: PromptCoder, count: int = 3) -> str:
    """A few completions of a rollout with their rewards, in a line each."""
    prompts, completions = texts_of(rollout, coder)
    total = rewards.sum(dim=1).tolist()
    count = min(count, len(rollout))
    rows = [n * len(rollout) // count for n in range(count)]
    lines = [f"  reward {total[n]:.2f}: {prompts[n]!r} -> {completions[n]!r}" for n in rows]
    return "\n".join(lines)


def rollout_metrics(rollout: Rollout, rewards: Tensor, names: list[str]) -> dict[str, float]:
    """Over all ranks: reward, lengths, and the share of completions that were cut off.

    Args:
        rewards: (N, rewards), see `compute_rewards`.
        names: of the rewards; where there are several, each has its mean.
    """
    total = rewards.sum(dim=1)
    sums = [len(rollout), total.sum(), total.square().sum()]
    sums += [sum(map(len, rollout.completions)), rollout.ended.count(False)]
    count, mean, square, length, cut, *each = sum_over_ranks(*sums, *rewards.sum(dim=0))
    mean, square = mean / count, square / count
    metrics = {"reward": mean, "reward_std": math.sqrt(max(0.0, square - mean**2))}
    metrics |= {"completion_length": length / count, "truncated": cut / count}
    if len(names) > 1:
        metrics |= {f"reward {n}": value / count for n, value in zip(names, each, strict=True)}
    return metrics
