"""Bits per byte of a text: `eval_model.py --text_file`."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

from dataset.pretrain_dataset import end_of_text
from dataset.progress import count_bar
from dataset.read_text import read_text
from runtime.scoring.likelihood import Continuation, score_continuations, text_begin

MAX_WINDOW = 2048  # tokens that are read at once


def score_text(model, path: Path) -> None:
    """Print how well the model predicts a text.

    Args:
        model: a `chat_model.ChatModel` that was opened raw.

    Raises:
        ValueError: not there, or see `read_text`.
    """
    if not path.exists():
        raise ValueError(f"--text_file {path}: no such file")
    text, started = read_text(path), time.monotonic()
    ids = model.plain(text)
    nats = text_nats(model, ids)
    size = len(text.encode())
    bits = nats / math.log(2) / size
    per_token = f"{nats / len(ids):.4f} nats per token"
    print(f"{path}: {bits:.4f} bits per byte")
    print(f"{size:,} bytes, {len(ids):,} tokens, {per_token}, {time.monotonic() - started:.1f} s")


def text_nats(model, ids: list[int]) -> float:
    """Minus the natural log of a text's probability, all of its tokens.

    The first token is behind the one that the tokenizer begins a text with, or else that which
    stands between documents.
    """
    begin = text_begin(model.tokenizer) or [end_of_text(model.tokenizer)]
    windows = list(text_windows(begin, ids, min(model.context, MAX_WINDOW)))
    with count_bar(len(windows), "scoring", " windows") as bar:
        scores = score_continuations(model.model, windows, bar.update)
    return -math.fsum(score.logprob for score in scores)


def text_windows(begin: list[int], ids: list[int], size: int) -> Iterator[Continuation]:
    """Windows that overlap by half: every token is scored once, behind what comes before it.

    Args:
        begin: the token before the first one.
        ids: of the text.
        size: tokens that the model reads in a window.
    """
    ids, step = begin + ids, max(1, size // 2)
    first = min(len(ids), size + 1)
    yield Continuation(ids[:1], ids[1:first])
    for at in range(first, len(ids), step):
        end = min(at + step, len(ids))
        yield Continuation(ids[end - size - 1 : at], ids[at:end])
