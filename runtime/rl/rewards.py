"""Rewards: what makes a completion good, for reinforcement learning.

A reward function takes (prompts, completions, rows) and returns a number for each completion.
Prompts and completions are texts; rows are the rows of the data file with all their fields.
`--reward` names one or several, with weights:

    --reward exact                        the reply is the row's "answer"
    --reward exact format:0.2             and it looks as the row's "format" says, weight 0.2
    --reward my_rewards.py:short          the function `short` of a file of yours
    --reward out/reward_512.pth           what trainer/train_reward.py made
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.prompt_coder import PromptCoder
from dataset.replies import final_answer
from model.lm import LMConfig
from runtime.parallel import gather_objects
from runtime.rl.rollout import Rollout


@dataclass
class Reward:
    """A reward function and what it counts."""

    name: str  # as --reward says it
    weight: float
    function: Callable[..., list[float]]  # of (prompts, completions, rows)
    reads_tokens: bool = False  # a reward model's: of the Rollout


def exact(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 where the reply is the row's "answer", else 0; what either may have thought is left out."""
    if any("answer" not in row for row in rows):
        raise ValueError('the row has no "answer"')
    pairs = zip(completions, rows, strict=True)
    return [float(final_answer(text) == final_answer(row["answer"])) for text, row in pairs]


FUNCTIONS = {"exact": exact}  # and in `reward_words.py` what else a word may mean


def load_rewards(words: list[str], policy: LMConfig, args) -> list[Reward]:
    """The rewards that the words of `--reward` name.

    Args:
        policy: its shape, vocabulary and tokenizer, which a reward model must fit.
        args: the flags device, max_seq_len, offload and strategy, which is chosen: ranks share a
            reward model where they share the policy.

    Raises:
        ValueError: see `reward_words.read_word`.
    """
    rewards = []
    for word in words:
        name, weight, function = word, 1.0, FUNCTIONS.get(word)
        if function is None:
            from runtime.rl.reward_words import read_word

            name, weight, function = read_word(word, FUNCTIONS, policy, args)
        rewards.append(Reward(name, weight, function, reads_tokens=name.endswith(".pth")))
    return rewards


def compute_rewards(
    rewards: list[Reward], rollout: Rollout, rows: list[dict], places: list[str], coder: PromptCoder
) -> Tensor:
    """The weighted rewards of a rollout, (N, rewards) float64: their sum is learned from.

    All ranks call it.

    Args:
        rows: of the data, one for each completion.
        places: `file:line` of each.

    Raises:
        ValueError: on every rank: a function that raised on some rank, or returned what is no list
            of numbers; names the function and the row.
    """
    prompts, completions = texts_of(rollout, coder)
    # First, as ranks may share these models: on every rank, whatever a function raises
    scores = {reward.name: reward.function(rollout) for reward in rewards if reward.reads_tokens}
    columns, problem = [], ""
    try:
        for reward in rewards:
            values = scores.get(reward.name, [])
            if not reward.reads_tokens and rows:
                values = call(reward, prompts, completions, rows, places)
            columns.append([reward.weight * value for value in values])
    except ValueError as error:
        problem = str(error)
    if problem := next(filter(None, gather_objects(problem)), ""):
        raise ValueError(problem)
    return torch.tensor(columns, dtype=torch.float64).view(len(rewards), -1).T


def texts_of(rollout: Rollout, coder: PromptCoder) -> tuple[list[str], list[str]]:
    """Prompts in the layout of a chat, and completions as the model wrote them."""
    prompts = coder.tokenizer.batch_decode(rollout.prompts)
    return prompts, [coder.decode_reply(ids) for ids in rollout.completions]


def call(reward: Reward, prompts, completions, rows, places) -> list[float]:
    """A reward function's numbers, checked.

    Raises:
        ValueError: what is wrong with them, or what the function raised, and for which row.
    """
    name, batch = reward.name, (prompts, completions, rows)
    try:
        values = reward.function(*batch)
    except Exception as error:  # whatever a user's function raises
        from runtime.rl.reward_faults import raised

        raise ValueError(raised(error, name, reward.function, batch, places)) from None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or len(numbers) != len(rows) or not all(map(math.isfinite, numbers)):
        from runtime.rl.reward_faults import wrong_values

        raise ValueError(wrong_values(values, numbers, name, completions, places))
    return numbers
