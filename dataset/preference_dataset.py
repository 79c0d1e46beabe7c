"""Preference pairs: two answers to one prompt, of which people, or a rule, chose one.

    {"chosen": [turns], "rejected": [turns]}                  MiniMind: both are whole conversations
    {"prompt": ..., "chosen": ..., "rejected": ...}           each a text, a turn or a list of turns
    {"conversations": [turns], "chosen": ..., "rejected": ...}  ShareGPT's name for the prompt

Turns have role and content, or from and value; roles and fields are those of chat rows, see
`chat_rows.py`.
"""

import numpy as np
from torch import Tensor

from dataset.cached_dataset import CachedDataset
from dataset.chat_encoder import ChatEncoder
from dataset.packing import split_rows
from dataset.plain_rows import SPECIAL, are_plain

NOT_PLAIN = SPECIAL | {"conversations", "margin"}  # fields of a row that `pair_rows.py` reads

Sample = tuple[Tensor, Tensor, Tensor]  # X, Y, loss_mask


class PreferenceDataset(CachedDataset):
    """A row is a pair; the loss mask covers the last turn, the answer, with its end-of-turn token.

    In the token cache a pair has two rows, chosen and rejected. `lengths` and `supervised` count
    the pair together, so that a pair is what an epoch shuffles and packs: its two sides always go
    through one forward pass. A pair with more than max_length tokens in all has a row of its own;
    only each side has to fit.

    An answer that is longer than the room for it is cut, and counted as truncated. A pair is
    dropped and counted where its prompt leaves no room for an answer, where its answers then are
    the same (what told them apart lies beyond max_length), and where it says not to learn from it.

    Args:
        max_length: longest side of a pair in tokens.
        data_path, tokenizer, cache_dir, skip_bad, curriculum: see `cached_dataset.CachedDataset`.

    Raises:
        ValueError: `file:line: reason` of a bad row; a missing or empty file; no usable row.
    """

    def __init__(
        self,
        data_path,
        tokenizer,
        max_length: int = 512,
        cache_dir=None,
        skip_bad: bool = False,
        curriculum: str = "none",
    ):
        settings = (True, cache_dir, skip_bad, curriculum)
        super().__init__(
            data_path,
            tokenizer,
            {"max_length": max_length},
            lambda: PairEncoder(tokenizer, max_length),
            *settings,
        )
        if self.difficulty is not None:
            self.difficulty = self.difficulty.reshape(-1, 2).mean(axis=1)
        self.lengths = self.lengths.reshape(-1, 2).sum(axis=1)
        self.supervised = self.supervised.reshape(-1, 2).sum(axis=1)
        self.stats = self.stats | {"rows": len(self.lengths)}

    def __getitem__(self, row: int) -> tuple[Sample, Sample]:
        """The chosen and the rejected side of a pair."""
        return super().__getitem__(2 * row), super().__getitem__(2 * row + 1)

    @staticmethod
    def collate(
        samples: list[tuple[Sample, Sample]], **split
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Lay the pairs one behind the other: doc_lens is [chosen 1, rejected 1, chosen 2, ...].

        Args:
            split, and what is returned: see `cached_dataset.CachedDataset.collate`.
        """
        return CachedDataset.collate([side for pair in samples for side in pair], **split)


def open_pairs(flags: dict, tokenizer):
    """The pairs of a run: (pairs, rows of them to train on, held-out pairs, rows of those).

    Args:
        flags: of the stage: data_path, max_seq_len, cache_dir, skip_bad, curriculum, seed; held out
            is the file eval_data, or the share eval_ratio of the pairs.

    Raises:
        ValueError: as `PreferenceDataset`; both ways of holding out are asked for.
    """
    eval_data, eval_ratio = flags["eval_data"], flags["eval_ratio"]
    if eval_data and eval_ratio:
        both = f"--eval_data {eval_data} and --eval_ratio {eval_ratio}"
        raise ValueError(f"{both}: use one of the two")
    options = (tokenizer, *(flags[name] for name in ("max_seq_len", "cache_dir", "skip_bad")))
    pairs = PreferenceDataset(flags["data_path"], *options, flags["curriculum"])
    train_rows, held_out = split_rows(len(pairs), eval_ratio, flags["seed"])
    if not eval_data:
        return pairs, train_rows, pairs, held_out
    others = PreferenceDataset(eval_data, *options)
    return pairs, train_rows, others, np.arange(len(others))


class PairEncoder:
    """A `cache_builder.Encoder`; the arguments are those of `PreferenceDataset`."""

    def __init__(self, tokenizer, max_length: int):
        self.coder = ChatEncoder(tokenizer)
        self.max_length = max_length

    def parse(self, row: object) -> list:
        """Both sides of a pair; ValueError: a fault of the row, without the file and line."""
        sides = read_plain_pair(row)
        if not sides:
            from dataset.pair_rows import normalise_pair

            sides = normalise_pair(row)
        return [self.coder.read_chat(messages, tools, "last") for messages, tools in sides]

    def encode(self, pairs: list[list]) -> list[tuple[list, bool]]:
        results, size = [], self.max_length + 1
        encoded = iter(self.coder.encode([chat for pair in pairs for chat in pair]))
        for pair in zip(encoded, encoded, strict=True):
            chosen, rejected = ((ids[:size], mask[:size]) for ids, mask in pair)
            is_learned = 1 in chosen[1] and 1 in rejected[1] and chosen != rejected
            truncated = any(len(ids) > size for ids, _ in pair)
            results.append(([chosen, rejected] if is_learned else [], truncated))
        return results


def read_plain_pair(row: object) -> list[tuple[list[dict], None]]:
    """(messages, no tools) of both sides; [] for a row that is not plain, or has a fault.

    Plain are three texts, or two conversations of turns that are a role and a text.
    """
    if not isinstance(row, dict) or not NOT_PLAIN.isdisjoint(row):
        return []
    prompt, *sides = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is not None:
        if not (prompt and all(isinstance(text, str) for text in (prompt, *sides))):
            return []
        asked = {"role": "user", "content": prompt}
        sides = [[asked, {"role": "assistant", "content": answer}] for answer in sides]
    if not all(map(are_plain, sides)):
        return []
    chosen, rejected = sides
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1] or chosen == rejected:
        return []
    answers = (chosen[-1], rejected[-1])
    is_answered = all(turn["role"] == "assistant" and turn["content"].strip() for turn in answers)
    return [(chosen, None), (rejected, None)] if is_answered else []
