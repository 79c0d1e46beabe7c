"""A reward model as a reward: what trainer/train_reward.py made scores completions."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from model.lm import LMConfig
from model.reward import RewardModel, read_reward_config
from runtime import given_weights, parallel
from runtime.frozen import wrap_frozen
from runtime.gradient_sync import is_fsdp
from runtime.kernel_loader import apply_kernels
from runtime.ranks import is_shared
from runtime.rl.rollout import Rollout
from runtime.same_tokenizer import check_same


def load_scorer(path: str, policy: LMConfig, args) -> Callable[[Rollout], list[float]]:
    """`scores_of` with the reward model in a file; arguments as for `rewards.load_rewards`.

    Raises:
        ValueError: there is none, or it is made for another tokenizer or a shorter context.
    """
    have = read_reward_config(path)
    if policy.tokenizer:
        check_same(Path(path), have.tokenizer, policy.tokenizer)
    if have.vocab_size != policy.vocab_size or have.max_seq_len < args.max_seq_len:
        raise ValueError(
            f"--reward {path}: made for {have.vocab_size} tokens and contexts of"
            f" {have.max_seq_len}, needed are {policy.vocab_size} and {args.max_seq_len}: train it"
            " with this tokenizer and --max_seq_len"
        )
    make = functools.partial(RewardModel, have)
    model, fill = given_weights.build(make, args.device, Path(path), None, is_shared(args))
    apply_kernels(model, args.device, "float32")
    return functools.partial(scores_of, wrap_frozen(model, args, "float32", fill))


@torch.no_grad()
def scores_of(model: RewardModel, rollout: Rollout, budget: int = 8192) -> list[float]:
    """The score of each prompt with its completion, at its last token.

    Args:
        model: of `frozen.wrap_frozen`; where ranks share it, all of them call this.
        budget: tokens of a forward pass, unless a single text is longer.
    """
    device = model.score.weight.device
    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    texts = [torch.tensor(prompt + completion) for prompt, completion in pairs]
    batches, room = [], 0
    for text in texts:
        if len(text) > room:
            batches.append([])
            room = budget
        batches[-1].append(text)
        room -= len(text)
    passes = len(batches)
    if is_fsdp(model):  # the same number on every rank, some with one token of padding
        passes = max(parallel.gather_objects(passes))
    scores = []
    for batch in batches + [[]] * (passes - len(batches)):
        ids = torch.cat(batch or [torch.zeros(1, dtype=torch.int64)]).unsqueeze(0).to(device)
        scores += model(ids, doc_lens=[len(text) for text in batch]).scores.tolist()
    return scores
