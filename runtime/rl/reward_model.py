"""A reward model as a reward: what trainer/train_reward.py made scores completions."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from model.reward import RewardModel, load_reward_model
from runtime.kernel_loader import apply_kernels
from runtime.rl.rollout import Rollout
from runtime.tokenizer_record import check_same


def load_scorer(
    path: str,
    vocab_size: int,
    max_seq_len: int,
    device: torch.device,
    tokenizer: dict | None = None,
) -> Callable[[Rollout], list[float]]:
    """`scores_of` with the reward model in a file.

    Raises:
        ValueError: there is none, or it is made for another tokenizer or a shorter context.
    """
    model = load_reward_model(path).to(device)
    apply_kernels(model, device, "float32")
    have = model.config
    if tokenizer:
        check_same(Path(path), have.tokenizer, tokenizer)
    if have.vocab_size != vocab_size or have.max_seq_len < max_seq_len:
        raise ValueError(
            f"--reward {path}: made for {have.vocab_size} tokens and contexts of"
            f" {have.max_seq_len}, needed are {vocab_size} and {max_seq_len}: train it with"
            " this tokenizer and --max_seq_len"
        )
    return functools.partial(scores_of, model)


@torch.no_grad()
def scores_of(model: RewardModel, rollout: Rollout, budget: int = 8192) -> list[float]:
    """The score of each prompt with its completion, at its last token.

    Args:
        budget: tokens of a forward pass, unless a single text is longer.
    """
    device = model.score.weight.device
    texts = [torch.cat(rollout.ids(row)) for row in range(len(rollout))]
    batches, room = [], 0
    for text in texts:
        if len(text) > room:
            batches.append([])
            room = budget
        batches[-1].append(text)
        room -= len(text)
    scores = []
    for batch in batches:
        ids = torch.cat(batch).unsqueeze(0).to(device)
        scores += model(ids, doc_lens=[len(text) for text in batch]).scores.tolist()
    return scores
