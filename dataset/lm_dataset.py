"""The datasets: a row of a data file -> (X, Y, loss_mask), ready to train on.

X and Y are int64 and loss_mask is int64 0/1, 1-D, of equal length T <= max_length, unpadded and
shifted by one: Y[t] is the token that follows X[t], and loss_mask[t] says whether predicting it
counts. Tokenising happens once, in `token_cache.py`; what a row becomes is decided by an encoder
(`sft_encoder.py`, `pretrain_encoder.py`), which is loaded only for that.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.token_cache import describe_tokenizer, open_cache
from dataset.tokenizer import load_tokenizer  # noqa: F401  # for the scripts

ROOT = Path(__file__).resolve().parents[1]
CACHE_DIR = ROOT / "out" / "cache"


class CachedDataset(Dataset):
    """Rows of a token cache as training samples.

    Args:
        tokenizer: a fast tokenizer, as `AutoTokenizer.from_pretrained` gives it.
        options, make_encoder: see `token_cache.open_cache`.
        masked: whether there are tokens without loss.
        cache_dir: where token caches live; default: out/cache.
        skip_bad: leave bad rows out and count them, instead of stopping at the first one.
        curriculum: what says how hard a row is: its 'length', or 'field:NAME', a number in it; or
            'none'.

    Attributes:
        key: hash of data, tokenizer and options, the identity of the data in checkpoints.
        lengths: (rows,) int64, T of each row, so that batches can be planned without reading a row.
        supervised: (rows,) int64, tokens with loss of each row.
        difficulty: (rows,) numbers by which an epoch is ordered; None without a curriculum.
        stats: counts of the file: rows, tokens, supervised, dropped, truncated, bad, first_bad.

    Raises:
        ValueError: `file:line: reason` of a bad row; a missing or empty file; no usable row.
    """

    def __init__(
        self,
        data_path,
        tokenizer,
        options: dict,
        make_encoder: Callable,
        masked: bool,
        cache_dir,
        skip_bad: bool,
        curriculum: str,
    ):
        cache_dir = Path(cache_dir or CACHE_DIR)
        backend, template = describe_tokenizer(tokenizer, cache_dir)
        if masked:  # a conversation
            options = options | {"chat_template": template}
        self.cache = open_cache(
            Path(data_path),
            cache_dir,
            options=options | {"tokenizer": backend, "stage": type(self).__name__},
            vocab_size=len(tokenizer),
            masked=masked,
            make_encoder=make_encoder,
            skip_bad=skip_bad,
            field=curriculum.removeprefix("field:") if curriculum.startswith("field:") else None,
        )
        self.key = self.cache.key
        self.stats = self.cache.stats
        self.lengths = self.cache.lengths.astype(np.int64) - 1
        self.supervised = self.cache.supervised.astype(np.int64)
        self.difficulty = self.lengths if curriculum == "length" else self.cache.difficulty

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self.cache[row]
        ids, mask = torch.from_numpy(ids), torch.from_numpy(mask).long()
        return ids[:-1], ids[1:], mask[1:]

    @staticmethod
    def collate(
        samples: list[tuple[Tensor, Tensor, Tensor]],
        part: int = 0,
        parts: int = 1,
        multiple: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Pack the samples of a micro-batch into one row, without padding.

        Args:
            part, parts: where processes share a row: which of its equal parts to return.
            multiple: tokens of a row are a multiple of it. Only here is there ever padding: fewer
                than `multiple` tokens behind the last document, without loss.

        Returns:
            X, Y, loss_mask: (1, N / parts) int64 each.
            doc_lens: lengths of the samples, the same for all parts; [] for no sample at all: a
                rank that has no row in the last window still takes part, with padding alone.
        """
        lens = [len(sample[0]) for sample in samples]
        padding = torch.zeros(-sum(lens) % multiple if samples else multiple, dtype=torch.int64)
        rows = [torch.cat(tensors) for tensors in zip(*samples, (padding,) * 3, strict=True)]
        size = len(rows[0]) // parts
        X, Y, loss_mask = (row[part * size : (part + 1) * size].unsqueeze(0) for row in rows)
        return X, Y, loss_mask, lens


class PretrainDataset(CachedDataset):
    """Documents: JSONL or a JSON array of {"text": ...}, or a .txt file with a document a line.

    A document ends with <|endoftext|>. One that is longer than max_length becomes several rows that
    overlap by one token, so that every token is predicted exactly once.

    Args:
        max_length: longest row in tokens.
        data_path, tokenizer, cache_dir, skip_bad, curriculum: see `CachedDataset`.
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
        def make_encoder():
            from dataset.pretrain_encoder import PretrainEncoder

            return PretrainEncoder(tokenizer, max_length)

        options = {"max_length": max_length}
        settings = (False, cache_dir, skip_bad, curriculum)
        super().__init__(data_path, tokenizer, options, make_encoder, *settings)


class SFTDataset(CachedDataset):
    """Conversations: MiniMind, ShareGPT, Alpaca or OpenAI messages, as JSONL or one JSON array.

    The format is that of the first row. The loss mask covers the assistant turns with their
    end-of-turn tokens, but for those that say not to learn from them (weight, train or loss: 0); a row with
    no supervised token within max_length is dropped and counted.

    Args:
        max_length: longest row in tokens.
        loss_on: 'all' assistant turns, or only the 'last' one.
        data_path, tokenizer, cache_dir, skip_bad, curriculum: see `CachedDataset`.
    """

    def __init__(
        self,
        data_path,
        tokenizer,
        max_length: int = 512,
        cache_dir=None,
        skip_bad: bool = False,
        loss_on: str = "all",
        curriculum: str = "none",
    ):
        def make_encoder():
            from dataset.sft_encoder import SFTEncoder

            return SFTEncoder(tokenizer, max_length, loss_on)

        options = {"max_length": max_length, "loss_on": loss_on}
        settings = (True, cache_dir, skip_bad, curriculum)
        super().__init__(data_path, tokenizer, options, make_encoder, *settings)


def describe(dataset: CachedDataset) -> str:
    """One line of counts: rows, tokens, supervised share, dropped, truncated and bad rows."""
    stats = dataset.stats
    share = stats["supervised"] / max(1, stats["tokens"])
    text = (
        f"{stats['rows']:,} rows, {stats['tokens']:,} tokens, {stats['supervised']:,} supervised "
        f"({share:.1%}), {stats['dropped']:,} dropped, {stats['truncated']:,} truncated"
    )
    if stats["bad"]:
        text += f", {stats['bad']:,} bad rows skipped (first: {stats['first_bad']})"
    return text
