"""Rewards: what makes a completion good, for the stages that learn by trying.

A reward function takes (prompts, completions, rows) and returns a number for each completion.
Prompts and completions are texts; rows are the rows of the data file with all their fields.
`--reward` names one or several, with weights:

    --reward exact                        the reply is the row's "answer"
    --reward exact format:0.2             and it looks as the row's "format" says, which counts a
    fifth --reward my_rewards.py:short          the function `short` of a file of yours
    --reward out/reward_512.pth           what trainer/train_reward.py made
"""

import functools
import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.chat_format import IM_END, decode_reply, final_answer
from model.reward import RewardModel, load_reward_model
from runtime.kernel_loader import apply_kernels
from runtime.parallel import data_world, gather_objects, sum_over_ranks
from runtime.rl.rollout import Rollout, generate

THINKING = r"<think>\n.*?\n</think>\n\n.+"  # the layout of a reply that thinks first


@dataclass
class Reward:
    name: str  # as --reward says it
    weight: float
    function: Callable | RewardModel


def exact(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 where reply and the row's "answer" are the same behind what either may have thought, else
    0."""
    if any("answer" not in row for row in rows):
        raise ValueError('the row has no "answer"')
    pairs = zip(completions, rows, strict=True)
    return [float(final_answer(text) == final_answer(row["answer"])) for text, row in pairs]


def format(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """1 where the whole completion matches the regular expression in the row's "format", else 0.

    A row without "format" wants a reply that thinks first.
    """
    pairs = zip(completions, rows, strict=True)
    return [
        float(bool(re.fullmatch(row.get("format", THINKING), text, re.DOTALL)))
        for text, row in pairs
    ]


FUNCTIONS = {"exact": exact, "format": format}


def load_rewards(
    words: list[str], vocab_size: int, max_seq_len: int, device: torch.device
) -> list[Reward]:
    """The rewards that the words of `--reward` name.

    Raises:
        ValueError: an unknown name, a file or function that is not there or cannot be loaded, a
        reward model of a shape
            that does not fit.
    """
    rewards = []
    for word in words:
        name, weight = word, 1.0
        if match := re.fullmatch(r"(.+):([-+.\d][-+.\de]*)", word):
            try:
                name, weight = match[1], float(match[2])
            except ValueError:
                raise ValueError(
                    f"--reward {word}: the weight {match[2]} is not a number"
                ) from None
        if name.endswith(".pth"):
            function = load_reward_model(name).to(device)
            apply_kernels(function, device, "float32")
            have = function.config
            if have.vocab_size != vocab_size or have.max_seq_len < max_seq_len:
                raise ValueError(
                    f"--reward {name}: made for {have.vocab_size} tokens and contexts of"
                    f" {have.max_seq_len}, needed are {vocab_size} and {max_seq_len}: train it with"
                    " this tokenizer and --max_seq_len"
                )
        elif ".py:" in name:
            function = function_in(name)
        elif name in FUNCTIONS:
            function = FUNCTIONS[name]
        else:
            known = ", ".join(FUNCTIONS)
            raise ValueError(
                f"--reward {word}: neither {known}, nor FILE.py:FUNCTION, nor a reward model's"
                " FILE.pth"
            )
        rewards.append(Reward(name, weight, function))
    return rewards


def function_in(name: str) -> Callable:
    """The function that FILE.py:FUNCTION names."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--reward {name}: there is no file {path}")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does when it is loaded
        raise ValueError(
            f"--reward {name}: {path} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {name}: {path} has no function {function}")
    return getattr(module, function)


def try_prompts(
    rewards: list[Reward],
    dataset,
    tokenizer,
    writer,
    numbers: list[int],
    samples: int,
    step: int,
    **options,
) -> tuple[Rollout, Tensor]:
    """Complete this rank's prompts and judge the completions. All ranks call it together.

    Args:
        dataset: a PromptDataset.
        writer: the model, see `rollout.whole_copy`.
        numbers: of the prompts in the dataset.
        options: see `rollout.generate`.

    Returns:
        The rollout, and its rewards (N, rewards), see `judge`.

    Raises:
        ValueError: see `judge`.
    """
    rollout = generate(
        writer, [dataset[n] for n in numbers], numbers, samples, step=step, **options
    )
    sources = [n for n in numbers for _ in range(samples)]
    rows, places = [dataset.rows[n] for n in sources], [dataset.places[n] for n in sources]
    return rollout, judge(rewards, rollout, rows, places, tokenizer)


def bind(args, rewards: list[Reward], dataset, tokenizer, autocast) -> Callable:
    """`try_prompts` as a stage calls it: tries(writer, numbers, samples, step), the rest being the
    flags of the run."""
    options = {
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
    }
    options |= {
        "end": tokenizer.convert_tokens_to_ids(IM_END),
        "seed": args.seed,
        "autocast": autocast,
    }
    return functools.partial(try_prompts, rewards, dataset, tokenizer, **options)


def greedy_reward(tries: Callable, writer, numbers) -> float:
    """Mean reward of the most probable completions of some prompts, each counted once over all
    ranks.

    Args:
        tries: `try_prompts` with its rewards, dataset, tokenizer and options.
        numbers: (n,) of the prompts, the same on every rank.
    """
    rank, ranks = data_world()
    _, scores = tries(writer, numbers[rank::ranks].tolist(), 1, 0, temperature=0.0)
    return sum_over_ranks(scores.sum())[0] / len(numbers)


def measures(rollout: Rollout, scores: Tensor, names: list[str]) -> dict[str, float]:
    """What the log says about a rollout, over all ranks: reward, lengths, how many completions were
    cut off.

    Args:
        scores: (N, rewards), see `judge`.
        names: of the rewards; where there are several, each has its mean.
    """
    total = scores.sum(dim=1)
    sums = [
        len(rollout),
        total.sum(),
        total.square().sum(),
        rollout.lengths.sum(),
        (~rollout.ended).sum(),
    ]
    count, mean, square, length, cut, *each = sum_over_ranks(*sums, *scores.sum(dim=0))
    mean, square = mean / count, square / count
    found = {"reward": mean, "reward_std": math.sqrt(max(0.0, square - mean**2))}
    found |= {"completion_length": length / count, "truncated": cut / count}
    named = {f"reward {name}": value / count for name, value in zip(names, each, strict=True)}
    return found | (named if len(names) > 1 else {})


def shown(rollout: Rollout, scores: Tensor, tokenizer, count: int = 3) -> str:
    """A few completions of a rollout with their rewards, in a line each."""
    prompts, completions = texts_of(rollout, tokenizer)
    at = (
        [n * len(rollout) // count for n in range(count)]
        if len(rollout) >= count
        else range(len(rollout))
    )
    totals = scores.sum(dim=1).tolist()
    return "\n".join(f"  reward {totals[n]:.2f}: {prompts[n]!r} -> {completions[n]!r}" for n in at)


def judge(
    rewards: list[Reward], rollout: Rollout, rows: list[dict], places: list[str], tokenizer
) -> Tensor:
    """The rewards of a rollout, weighted, (N, rewards) float64; their sum is what is learned from.
    For all ranks.

    Args:
        rows: of the data, one for each completion.
        places: `file:line` of each.

    Raises:
        ValueError: on every rank: a function that raised on some rank, or returned what is no list
        of numbers; names
            the function and the row.
    """
    prompts, completions = texts_of(rollout, tokenizer)
    columns, problem = [], ""
    try:
        for reward in rewards:
            if isinstance(reward.function, RewardModel):
                values = model_scores(reward.function, rollout)
            else:
                values = (
                    call(reward.name, reward.function, prompts, completions, rows, places)
                    if rows
                    else []
                )
            columns.append([reward.weight * value for value in values])
    except ValueError as error:
        problem = str(error)
    if problem := next(filter(None, gather_objects(problem)), ""):
        raise ValueError(problem)
    return torch.tensor(columns, dtype=torch.float64).view(len(rewards), -1).T


def texts_of(rollout: Rollout, tokenizer) -> tuple[list[str], list[str]]:
    """Prompts and completions as texts: prompts in the layout of a chat, completions as the model
    wrote them."""
    pairs = [rollout.ids(row) for row in range(len(rollout))]
    prompts = tokenizer.batch_decode([prompt.tolist() for prompt, _ in pairs])
    return prompts, [decode_reply(ids.tolist(), tokenizer) for _, ids in pairs]


def call(name: str, function: Callable, prompts, completions, rows, places) -> list[float]:
    """A reward function's numbers, checked.

    Raises:
        ValueError: what is wrong with them, or what the function raised, and for which row.
    """
    try:
        values = function(prompts, completions, rows)
    except Exception as error:  # whatever a user's function raises
        where = places[culprit(function, prompts, completions, rows)]
        raise ValueError(
            f"--reward {name} raised {type(error).__name__} at {where}: {error}"
        ) from None
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
    for value, text, where in zip(values, completions, places, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"--reward {name} returned {value} at {where} for the completion {text[:60]!r}"
            )
    return values


def culprit(function: Callable, prompts, completions, rows) -> int:
    """The first row for which a function raises when it is called with that row alone."""
    for n in range(len(rows)):
        try:
            function(prompts[n : n + 1], completions[n : n + 1], rows[n : n + 1])
        except Exception:
            return n
    return 0  # only with all of them


@torch.no_grad()
def model_scores(model: RewardModel, rollout: Rollout, budget: int = 8192) -> list[float]:
    """The reward model's score of each prompt with its completion, at its last token."""
    texts, device = (
        [torch.cat(rollout.ids(row)) for row in range(len(rollout))],
        model.score.weight.device,
    )
    scores, at = [], 0
    while at < len(texts):
        batch = [texts[at]]
        while (
            at + len(batch) < len(texts)
            and sum(map(len, batch)) + len(texts[at + len(batch)]) <= budget
        ):
            batch.append(texts[at + len(batch)])
        out = model(
            torch.cat(batch).unsqueeze(0).to(device), doc_lens=[len(text) for text in batch]
        )
        scores += out.scores.tolist()
        at += len(batch)
    return scores
