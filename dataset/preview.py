"""Rows of data as the model sees them, as text, for --preview."""

import json

import numpy as np

from dataset.cached_dataset import CachedDataset, describe
from dataset.prompt_dataset import PromptDataset, describe_prompts
from dataset.prompt_rows import TALK


def preview(dataset: CachedDataset, tokenizer, count: int, colour: bool = False) -> str:
    """The first samples as the model sees them, each with its counts; then those of the file."""
    shown = ""
    for row in range(min(count, len(dataset))):
        counts = f"{dataset.lengths[row]} tokens, {dataset.supervised[row]} supervised"
        text = mark_supervised(*dataset.read_row(row), tokenizer, colour)
        shown += f"--- sample {row}: {counts}\n{text}\n"
    return f"{shown}--- {describe(dataset)}"


def show_pairs(dataset, tokenizer, count: int, colour: bool) -> str:
    """The first pairs of a `PreferenceDataset`, each side with its counts."""
    shown = ""
    for row in range(min(count, len(dataset))):
        for side, name in enumerate(("chosen", "rejected")):
            ids, mask = dataset.read_row(2 * row + side)
            counts = f"{len(ids) - 1} tokens, {mask[1:].sum()} supervised"
            text = mark_supervised(ids, mask, tokenizer, colour)
            shown += f"--- pair {row}, {name}: {counts}\n{text}\n"
    return shown


def preview_prompts(dataset: PromptDataset, tokenizer, count: int) -> str:
    """Prompts as the model sees them, their rows' other fields, and the counts of the file."""
    lines = []
    for number in range(min(count, len(dataset))):
        fields = {key: value for key, value in dataset.rows[number].items() if key not in TALK}
        lines.append(
            f"--- prompt {number}: {len(dataset[number])} tokens,"
            f" {json.dumps(fields, ensure_ascii=False)}"
        )
        lines.append(tokenizer.decode(dataset[number]))
    return "\n".join([*lines, "--- " + describe_prompts(dataset)])


def mark_supervised(ids: np.ndarray, mask: np.ndarray, tokenizer, colour: bool) -> str:
    """The text of a row, what carries loss between [[ and ]], or in green."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    shown, at = "", 0
    for stop in [*(np.flatnonzero(np.diff(mask)) + 1), len(ids)]:
        text = tokenizer.decode(ids[at:stop].tolist())
        shown += f"{begin}{text}{end}" if mask[at] else text
        at = stop
    return shown
