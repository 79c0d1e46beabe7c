"""Preference pairs: two answers to one prompt, of which people, or a rule, chose one.

    {"chosen": [turns], "rejected": [turns]}                  MiniMind: both are whole conversations
    {"prompt": ..., "chosen": ..., "rejected": ...}           each a text, a turn or a list of turns
    {"conversations": [turns], "chosen": ..., "rejected": ...}  ShareGPT's name for the prompt

Turns have role and content, or from and value; roles and fields are those of chat rows, see
`chat_rows.py`.
"""

import numpy as np
from torch import Tensor

from dataset.chat_format import Chat, chat_coder
from dataset.chat_rows import add_row_fields, is_sharegpt, normalise_turns
from dataset.checks import present
from dataset.lm_dataset import CachedDataset
from dataset.packing import split_rows
from dataset.row_fields import refuse

SIDES = ("chosen", "rejected")
SHAPES = '{"chosen": [turns], "rejected": [turns]} or {"prompt", "chosen", "rejected"}'

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
        data_path, tokenizer, cache_dir, skip_bad, curriculum: see `lm_dataset.CachedDataset`.

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
            split, and what is returned: see `lm_dataset.CachedDataset.collate`.
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
        self.coder = chat_coder(tokenizer)
        self.max_length = max_length

    def parse(self, row: object) -> list[Chat]:
        return [self.coder.read_chat(*side, "last") for side in normalise_pair(row)]

    def encode(self, pairs: list[list[Chat]]) -> list[tuple[list, bool]]:
        encoded = iter(self.coder.encode([chat for pair in pairs for chat in pair]))
        sides = zip(encoded, encoded, strict=True)
        return [truncate(list(pair), self.max_length) for pair in sides]


def normalise_pair(row: object) -> list[tuple[list[dict], list[dict] | None]]:
    """Bring a row into two conversations, chosen and rejected, as `ChatCoder` takes them.

    They are alike up to the last turn, which is the assistant's.

    Raises:
        ValueError: a fault of the row, in one line, without the file and line.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object {SHAPES}, found {type(row).__name__}")
    row = present(row)
    for side in SIDES:
        if side not in row:
            found = ", ".join(map(repr, list(row)[:10])) or "none"
            raise ValueError(
                f"a preference pair needs {side!r}; keys found: {found}; accepted: {SHAPES}"
            )
    refuse(row, {"margin": "pairs are learned without one, take the field out"})
    prompt = turns_of(row.get("prompt") or row.get("conversations") or [], "user", "prompt")
    chats = [normalise_side(row, prompt, side) for side in SIDES]
    (chosen, _), (rejected, _) = chats
    if chosen[-1] == rejected[-1] and chosen[:-1] == rejected[:-1]:
        raise ValueError("chosen and rejected are the same answer: there is nothing to prefer")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            "chosen and rejected answer different prompts: they may differ in their last turn only"
        )
    if len(chosen) == 1:
        raise ValueError(f"there is no prompt before the answers; accepted: {SHAPES}")
    return chats


def normalise_side(row: dict, prompt: list[dict], side: str) -> tuple[list[dict], list | None]:
    """The conversation that ends with the answer of a side, and its tools."""
    answer = turns_of(row[side], "assistant", side)
    if answer and answer[0]["role"] in ("system", "user"):
        answer = with_prompt(answer, prompt, side)
    else:
        answer = [*prompt, *answer]
    if not answer:
        raise ValueError(f"{side}: empty conversation")
    messages, tools = add_row_fields(answer, row)
    last = messages[-1]
    if last["role"] != "assistant":
        fault = f"the last turn must be the assistant's answer, it is of role {last['role']}"
        raise ValueError(f"{side}: {fault}")
    if not (last["content"].strip() or last.get("reasoning_content") or last.get("tool_calls")):
        raise ValueError(f"{side}: the answer is empty")
    return messages, tools


def turns_of(part: object, role: str, name: str) -> list[dict]:
    """A text, a turn or a list of turns as messages; a text is of the role."""
    turns = part if isinstance(part, list) else [part]
    sharegpt = is_sharegpt(turns)
    by, text = ("from", "value") if sharegpt else ("role", "content")
    try:
        return normalise_turns(
            [{by: role, text: turn} if isinstance(turn, str) else turn for turn in turns], sharegpt
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def with_prompt(whole: list[dict], prompt: list[dict], side: str) -> list[dict]:
    """A side that is the whole conversation and repeats the prompt, perhaps not its system turn.

    Raises:
        ValueError: it does not repeat it.
    """
    size = len(prompt)
    if any(whole[at : at + size] == prompt for at in range(len(whole) - size + 1)):
        return whole
    if prompt[0]["role"] == "system" and whole[: size - 1] == prompt[1:]:
        return [prompt[0], *whole]
    raise ValueError(
        f"{side}: it begins with a {whole[0]['role']} turn, so it is the whole conversation, but it"
        " does not repeat the prompt: take the prompt out of the row, or all but the answer out of"
        " this field"
    )


def truncate(
    sides: list[tuple[list[int], list[int]]], max_length: int
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Both sides (ids, mask) within max_length + 1 tokens, and whether one was longer.

    There are no sides if nothing is left to learn from.
    """
    size = max_length + 1
    shorter = [(ids[:size], mask[:size]) for ids, mask in sides]
    learned = all(1 in mask for _, mask in shorter) and shorter[0] != shorter[1]
    return (shorter if learned else []), any(len(ids) > size for ids, _ in sides)
