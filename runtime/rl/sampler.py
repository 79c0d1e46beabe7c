"""Completions of a data set's prompts with their rewards, and what the log says about them."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dataset.chat_format import ChatCoder
from dataset.prompt_dataset import PromptDataset
from runtime.parallel import sum_over_ranks
from runtime.rl.rewards import Reward, compute_rewards, texts_of
from runtime.rl.rollout import Rollout, generate


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


def show_samples(rollout: Rollout, rewards: Tensor, coder: ChatCoder, count: int = 3) -> str:
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
        means = [value / count for value in each]
        metrics |= {f"reward {name}": value for name, value in zip(names, means, strict=True)}
    return metrics
