"""Prompts for RL: rows of the four chat formats that end where the assistant is to speak."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dataset.plain_rows import plain_format, plain_messages
from dataset.prompt_coder import PromptCoder
from dataset.read_rows import read_rows


class PromptDataset(Dataset):
    """Prompts, each with the whole row it came from: its other fields are for the rewards.

    A row that ends with an assistant turn is the prompt before that turn; the turn, without its
    thinking, is its "answer", if the row has no field of that name. Prompts are few and short: they
    are tokenised at every start and kept in memory.

    Args:
        data_path: MiniMind, ShareGPT, Alpaca or OpenAI conversations, JSONL or one JSON array.
        tokenizer: a fast tokenizer.
        max_length: longest prompt with its completion, in tokens.
        max_new_tokens: longest completion; a prompt that leaves no room for it is dropped and
            counted.
        skip_bad: leave bad rows out and count them.

    Attributes:
        coder: what encodes them, and decodes the replies.
        rows: the parsed rows; each has "answer" where one is known.
        places: `file:line` of each row.
        key: hash of data, tokenizer and options, the identity of the data in checkpoints.
        lengths: (rows,) int64, tokens of a prompt with the longest completion, for
            `packing.plan_epoch`.
        supervised: (rows,) int64, tokens of the longest completion.
        stats: counts of the file: rows, tokens (of the prompts), dropped, bad, first_bad.

    Raises:
        ValueError: `file:line: reason` of a bad row; a missing or empty file; no usable row.
    """

    def __init__(
        self, data_path, tokenizer, max_length: int, max_new_tokens: int, skip_bad: bool = False
    ):
        path, fmt = Path(data_path), None
        if not path.is_file():
            raise ValueError(f"{path}: no such data file")
        self.coder = PromptCoder(tokenizer)
        self.prompts: list[list[int]] = []
        self.rows, self.places, bad, dropped = [], [], [], 0
        for (line, row, fault), _ in read_rows(path):
            try:
                if fault:
                    raise ValueError(fault)
                fmt = fmt or plain_format(row, need_assistant=False)
                prompt = read_plain_prompt(row, fmt)
                if not prompt:
                    from dataset.chat_rows import detect_format
                    from dataset.prompt_rows import split_prompt

                    fmt = fmt or detect_format(row)
                    prompt = split_prompt(row, fmt, self.coder.general)
                messages, tools, row = prompt
                ids = self.coder.encode_prompt(messages, tools)
            except (ValueError, RecursionError) as error:
                if not skip_bad:
                    raise ValueError(f"{path}:{line}: {error}") from None
                bad.append(f"line {line}: {error}")
                continue
            if len(ids) + max_new_tokens > max_length:
                dropped += 1
                continue
            self.prompts.append(ids)
            self.rows.append(row)
            self.places.append(f"{path}:{line}")
        if not self.prompts:
            if not bad and not dropped:
                raise ValueError(f"{path}: the file is empty")
            room = f"--max_seq_len {max_length} with --max_new_tokens {max_new_tokens}"
            why = f"{len(bad)} bad, {dropped} too long for {room}"
            raise ValueError(f"{path}: no usable row: {why}. {(bad or [''])[0]}".rstrip())
        tokens = np.array([len(ids) for ids in self.prompts], np.int64)
        self.lengths = tokens + max_new_tokens
        self.supervised = np.full(len(tokens), max_new_tokens, np.int64)
        self.stats = {"rows": len(tokens), "tokens": int(tokens.sum()), "dropped": dropped}
        self.stats |= {"bad": len(bad), "first_bad": (bad or [""])[0]}
        backend = tokenizer.backend_tokenizer.to_str()
        content = json.dumps([self.prompts, self.rows, backend, max_length, max_new_tokens])
        self.key = hashlib.sha256(content.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> list[int]:
        """The ids of a prompt, up to where the assistant is to speak."""
        return self.prompts[row]


def read_plain_prompt(row: Any, fmt: str | None) -> tuple[list[dict], None, dict] | None:
    """As `prompt_rows.split_prompt`; None for a row that is not plain, or has a fault.

    Plain are turns of roles and texts that end with the user's.
    """
    messages = plain_messages(row, fmt, need_assistant=False)
    if not messages or messages[-1]["role"] != "user" or None in row.values():
        return None
    return (messages, None, row) if isinstance(row.get("answer", ""), str) else None


def describe_prompts(dataset: PromptDataset) -> str:
    """One line of counts: prompts, their tokens, dropped and bad rows."""
    stats = dataset.stats
    mean = stats["tokens"] / stats["rows"]
    text = f"{stats['rows']:,} prompts of {mean:.1f} tokens on average"
    bad = f", {stats['bad']:,} bad rows skipped (first: {stats['first_bad']})"
    return f"{text}, {stats['dropped']:,} dropped{bad if stats['bad'] else ''}"
