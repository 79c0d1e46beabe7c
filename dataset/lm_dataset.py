"""The datasets: a row of a data file -> (X, Y, loss_mask), ready to train on.

X and Y are int64 and loss_mask is int64 0/1, 1-D, of equal length T <= max_length, unpadded and
shifted by one: Y[t] is the token that follows X[t], and loss_mask[t] says whether predicting it
counts. Tokenising happens once, in `token_cache.py`; what a conversation looks like in tokens is
decided in `chat_format.py`.
"""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.chat_format import (
    chat_coder,
    detect_format,
    encode_chats,
    normalise_row,
    plain_encoder,
)
from dataset.chat_rows import REFUSED, learns, present, refuse
from dataset.token_cache import open_cache, recall, remember

ROOT = Path(__file__).resolve().parents[1]
CACHE_DIR = ROOT / "out" / "cache"
END_OF_TEXT = "<|endoftext|>"  # stands between the documents of pretraining


class LazyTokenizer:
    """The tokenizer in a folder, a `PreTrainedTokenizerFast` that is loaded when it is first asked
    for anything.

    With a warm cache a run does not: importing transformers would be a second or two of its start.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.size = Path(folder), None

    @functools.cached_property
    def loaded(self):
        from transformers import (
            PreTrainedTokenizerFast,  # AutoTokenizer takes a second longer to import
        )

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.folder)
        except (
            Exception
        ) as error:  # of json or of tokenizers, whose errors have no class of their own
            raise ValueError(
                f"--tokenizer_dir {self.folder}: tokenizer.json is damaged: {error}"
            ) from None

    def __getattr__(self, name: str):
        if name.startswith("__"):  # asked for by whoever copies it
            raise AttributeError(name)
        return getattr(self.loaded, name)

    def __len__(self) -> int:
        return self.size or len(self.loaded)

    def described(self, cache_dir: Path) -> str:
        """All that encoding depends on, as text. It is kept in cache_dir for as long as files and
        libraries stay."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".txt"))
        parts = [
            *(version(name).encode() for name in ("transformers", "tokenizers")),
            *(p.read_bytes() for p in files),
        ]
        path = cache_dir / f"tokenizer_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.json"
        known = recall(path)
        if known is None:
            known = {"size": len(self.loaded), "text": self.loaded.backend_tokenizer.to_str()}
            try:
                cache_dir.mkdir(parents=True, exist_ok=True)
                remember(path, known)
            except OSError:  # what cannot be written is loaded next time, too
                pass
        self.size = known["size"]
        return known["text"]


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> LazyTokenizer:
    """The tokenizer in a folder.

    Args:
        vocab_size: of the model that it is for, where that is there already.

    Raises:
        ValueError: there is none, or it has more entries than the model; later, when it is loaded:
        it is damaged.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer_dir {folder}: there is no tokenizer.json")
    tokenizer = LazyTokenizer(folder)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        sizes = f"{len(tokenizer)} entries, the model {vocab_size}"
        raise ValueError(
            f"--tokenizer_dir {folder}: it has {sizes}; take the tokenizer that the model was"
            " trained with"
        )
    return tokenizer


class CachedDataset(Dataset):
    """Rows of a token cache as training samples.

    Attributes:
        key: hash of data, tokenizer and options, the identity of the data in checkpoints.
        lengths: (rows,) int64, T of each row, so that batches can be planned without reading a row.
        supervised: (rows,) int64, tokens with loss of each row.
        difficulty: (rows,) numbers by which an epoch is ordered; None without a curriculum.
        stats: counts of the file: rows, tokens, supervised, dropped, truncated, bad, first_bad.
    """

    def __init__(
        self,
        data_path,
        tokenizer,
        options: dict,
        encode,
        masked: bool,
        cache_dir,
        skip_bad: bool,
        curriculum: str,
    ):
        cache_dir, lazy = Path(cache_dir or CACHE_DIR), isinstance(tokenizer, LazyTokenizer)
        backend = tokenizer.described(cache_dir) if lazy else tokenizer.backend_tokenizer.to_str()
        self.cache = open_cache(
            Path(data_path),
            cache_dir,
            {**options, "tokenizer": backend, "stage": type(self).__name__},
            vocab_size=len(tokenizer),
            masked=masked,
            encode=encode,
            skip_bad=skip_bad,
            field=curriculum.removeprefix("field:") if curriculum.startswith("field:") else None,
        )
        self.key, self.stats = self.cache.key, self.cache.stats
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
        """Lay the samples of a micro-batch one behind the other: no padding, whatever their
        lengths.

        Args:
            part, parts: where processes share a row: which of its equal parts to return.
            multiple: tokens of a row are a multiple of it. Only here is there ever padding: fewer
            than `multiple`
                tokens behind the last document, without loss.

        Returns:
            X, Y, loss_mask: (1, N / parts) int64 each.
            doc_lens: lengths of the samples, the same for all parts; [] for no sample at all: a
            rank that has no row in
                the last window still takes part, with padding alone.
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
        data_path: the file.
        tokenizer: a fast tokenizer, as `AutoTokenizer.from_pretrained` gives it.
        max_length: longest row in tokens.
        cache_dir: where token caches live; default: out/cache.
        skip_bad: leave bad rows out and count them, instead of stopping at the first one.
        curriculum: what says how hard a row is: its 'length', or 'field:NAME', a number in it; or
        'none'.

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
        @functools.cache
        def encoder() -> tuple:
            end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
            unknown = end is None or end == tokenizer.unk_token_id
            return plain_encoder(tokenizer), tokenizer.eos_token_id if unknown else end

        def encode(rows: list[object]) -> list:
            plain, end = encoder()
            texts = [row_text(row) for row in rows]
            encoded = iter(plain.batch([text for text in texts if isinstance(text, str)]))
            results = []
            for text in texts:
                if not isinstance(text, str):
                    results.append(text or ([], False))
                    continue
                ids = [*next(encoded), end]
                pieces = [
                    ids[at : at + max_length + 1] for at in range(0, len(ids) - 1, max_length)
                ]
                results.append(([(piece, [1] * len(piece)) for piece in pieces], False))
            return results

        options = {"max_length": max_length}
        super().__init__(
            data_path, tokenizer, options, encode, False, cache_dir, skip_bad, curriculum
        )


class SFTDataset(CachedDataset):
    """Conversations: MiniMind, ShareGPT, Alpaca or OpenAI messages, as JSONL or one JSON array.

    The format is detected from the first row of the file. The loss mask covers the assistant turns
    with their <|im_end|>, but for those that say not to learn from them (weight, train or loss: 0);
    a row that is left with no supervised token, so or by being cut at max_length, is dropped and
    counted.

    Args:
        data_path, tokenizer, max_length, cache_dir, skip_bad, curriculum: see `PretrainDataset`.
        loss_on: 'all' assistant turns, or only the 'last' one.

    Raises:
        ValueError: as `PretrainDataset`.
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
        coder, found = functools.cache(lambda: chat_coder(tokenizer)), []

        def encode(rows: list[object]) -> list:
            chats = []
            for row in rows:
                try:
                    if not found:
                        found.append(detect_format(row))
                    chats.append(normalise_row(row, found[0]))
                except (ValueError, RecursionError) as error:
                    chats.append(ValueError(error))
            encoded = iter(
                encode_chats([c for c in chats if not isinstance(c, ValueError)], coder(), loss_on)
            )
            results = []
            for chat in chats:
                if isinstance(chat, ValueError):
                    results.append(chat)
                    continue
                ids, mask = next(encoded)
                cut = len(ids) > max_length + 1
                ids, mask = ids[: max_length + 1], mask[: max_length + 1]
                results.append(([(ids, mask)] if 1 in mask else [], cut))
            return results

        options = {"max_length": max_length, "loss_on": loss_on}
        super().__init__(
            data_path, tokenizer, options, encode, True, cache_dir, skip_bad, curriculum
        )


def row_text(row: object) -> str | ValueError | None:
    """The text of a pretraining row, what is wrong with it, or None: the row says not to learn from
    it."""
    if isinstance(row, str):
        text = row
    elif not isinstance(row, dict):
        return ValueError(f'a row must be an object {{"text": ...}}, found {type(row).__name__}')
    elif not isinstance(row.get("text"), str):
        keys = ", ".join(list(row)[:5]) or "none"
        return ValueError(f'a pretraining row needs a string under "text"; keys found: {keys}')
    else:
        text, row = row["text"], present(row)
        try:
            refuse(row, REFUSED)
            learned = learns(row)
        except ValueError as error:
            return error
        if not learned:
            return None
    return text


def preview(dataset: CachedDataset, tokenizer, count: int, colour: bool = False) -> str:
    """Samples as the model sees them, what carries loss between [[ and ]] (or in green), and the
    counts of the file."""
    lines = []
    for row in range(min(count, len(dataset))):
        shown = marked(*dataset.cache[row], tokenizer, colour)
        lines.append(
            f"--- sample {row}: {dataset.lengths[row]} tokens, {dataset.supervised[row]}"
            f" supervised\n{shown}"
        )
    return "\n".join([*lines, "--- " + describe(dataset)])


def marked(ids: np.ndarray, mask: np.ndarray, tokenizer, colour: bool) -> str:
    """The text of a row of the token cache, what carries loss between [[ and ]], or in green."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    shown, at = "", 0
    for stop in [*(np.flatnonzero(np.diff(mask)) + 1), len(ids)]:
        text = tokenizer.decode(ids[at:stop].tolist())
        shown += f"{begin}{text}{end}" if mask[at] else text
        at = stop
    return shown


def describe(dataset: CachedDataset) -> str:
    """One line of counts: rows, tokens, supervised share, dropped, truncated and bad rows."""
    stats = dataset.stats
    text = (
        f"{stats['rows']:,} rows, {stats['tokens']:,} tokens, {stats['supervised']:,} supervised "
        f"({stats['supervised'] / max(1, stats['tokens']):.1%}), {stats['dropped']:,} dropped, "
        f"{stats['truncated']:,} truncated"
    )
    return text + (
        f", {stats['bad']:,} bad rows skipped (first: {stats['first_bad']})" if stats["bad"] else ""
    )
