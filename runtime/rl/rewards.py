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
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.chat_format import ChatCoder
from dataset.replies import final_answer
from model.lm import LMConfig
from runtime.parallel import gather_objects
from runtime.rl.rollout import Rollout

THINKING = r"<think>\n.*?\n</think>\n\n.+"  # the layout of a reply that thinks first


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


def format(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 where the completion matches the regular expression in the row's "format", else 0.

    A row without "format" wants a reply that thinks first.
    """
    patterns = [row.get("format", THINKING) for row in rows]
    pairs = zip(patterns, completions, strict=True)
    return [float(bool(re.fullmatch(pattern, text, re.DOTALL))) for pattern, text in pairs]


FUNCTIONS = {"exact": exact, "format": format}


def load_rewards(words: list[str], policy: LMConfig, args) -> list[Reward]:
    """The rewards that the words of `--reward` name.

    Args:
        policy: its shape, vocabulary and tokenizer, which a reward model must fit.
        args: the flags device, max_seq_len, offload and strategy, which is chosen: ranks share a
            reward model where they share the policy.

    Raises:
        ValueError: an unknown name, a file or function that is not there or cannot be loaded, a
            reward model of a shape that does not fit.
    """
    rewards = []
    for word in words:
        name, weight = word, 1.0
        if match := re.fullmatch(r"(.+):([-+.\d][-+.\de]*)", word):
            try:
                name, weight = match[1], float(match[2])
            except ValueError:
                message = f"--reward {word}: the weight {match[2]} is not a number"
                raise ValueError(message) from None
        if name.endswith(".pth"):
            from runtime.rl.reward_model import load_scorer

            function = load_scorer(name, policy, args)
        elif ".py:" in name:
            from runtime.rl.reward_file import function_in

            function = function_in(name)
        elif name in FUNCTIONS:
            function = FUNCTIONS[name]
        else:
            known = ", ".join(FUNCTIONS)
            raise ValueError(
                f"--reward {word}: neither {known}, nor FILE.py:FUNCTION, nor a reward model's"
                " FILE.pth"
            )
        rewards.append(Reward(name, weight, function, reads_tokens=name.endswith(".pth")))
    return rewards


def compute_rewards(
    rewards: list[Reward], rollout: Rollout, rows: list[dict], places: list[str], coder: ChatCoder
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


def texts_of(rollout: Rollout, coder: ChatCoder) -> tuple[list[str], list[str]]:
    """Prompts in the layout of a chat, and completions as the model wrote them."""
    pairs = [rollout.ids(row) for row in range(len(rollout))]
    prompts = coder.tokenizer.batch_decode([prompt.tolist() for prompt, _ in pairs])
    return prompts, [coder.decode_reply(ids.tolist()) for _, ids in pairs]


def call(reward: Reward, prompts, completions, rows, places) -> list[float]:
    """A reward function's numbers, checked.

    Raises:
        ValueError: what is wrong with them, or what the function raised, and for which row.
    """
    name = reward.name
    try:
        values = reward.function(prompts, completions, rows)
    except Exception as error:  # whatever a user's function raises
        place = places[failing_row(reward.function, prompts, completions, rows)]
        kind = type(error).__name__
        raise ValueError(f"--reward {name} raised {kind} at {place}: {error}") from None
    try:
        values = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"--reward {name} must return a list of numbers, it returned {type(values).__name__}"
            f" for the completions of {places[0]} and on"
        ) from None
    if len(values) != len(rows):
        raise ValueError(
            f"--reward {name} returned {len(values)} numbers for {len(rows)} completions, those of"
            f" {places[0]} and on"
        )
    for value, text, place in zip(values, completions, places, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"--reward {name} returned {value} at {place} for the completion {text[:60]!r}"
            )
    return values


def failing_row(function: Callable, prompts, completions, rows) -> int:
    """The first row for which a function raises when it is called with that row alone."""
    for n in range(len(rows)):
        try:
            function(prompts[n : n + 1], completions[n : n + 1], rows[n : n + 1])
        except Exception:
            return n
    return 0  # only with all of them
