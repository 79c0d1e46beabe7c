"""Documents for pretraining."""

import functools

from dataset.cached_dataset import CachedDataset
from dataset.plain_text import PlainText

END_OF_TEXT = "<|endoftext|>"  # stands between the documents


def end_of_text(tokenizer) -> int:
    """The id of the token that stands between documents."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    unknown = end is None or end == tokenizer.unk_token_id
    return tokenizer.eos_token_id if unknown else end


class PretrainDataset(CachedDataset):
    """Documents: JSONL or a JSON array of {"text": ...}, or a .txt file with a document a line.

    A document ends with <|endoftext|>. One that is longer than max_length becomes several rows that
    overlap by one token, so that every token is predicted exactly once.

    Args:
        max_length: longest row in tokens.
        data_path, tokenizer, cache_dir, skip_bad, curriculum: see `cached_dataset.CachedDataset`.
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
        options = {"max_length": max_length}
        make_encoder = functools.partial(PretrainEncoder, tokenizer, max_length)
        settings = (False, cache_dir, skip_bad, curriculum)
        super().__init__(data_path, tokenizer, options, make_encoder, *settings)


class PretrainEncoder:
    """A `cache_builder.Encoder`; the arguments are those of `PretrainDataset`."""

    def __init__(self, tokenizer, max_length: int):
        self.end = end_of_text(tokenizer)
        self.plain = PlainText(tokenizer)
        self.max_length = max_length

    def parse(self, row: object) -> str | None:
        """The text of a row, or None: it says not to learn from it."""
        if isinstance(row, str):
            return row
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            from dataset.row_faults import wrong_document

            raise wrong_document(row)
        if len(row) > 1:
            from dataset.row_fields import document_learns

            return row["text"] if document_learns(row) else None
        return row["text"]

    def encode(self, texts: list[str | None]) -> list[tuple[list, bool]]:
        encoded = iter(self.plain.batch([text for text in texts if text is not None]))
        return [([] if text is None else self.split(next(encoded)), False) for text in texts]

    def split(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Pieces of max_length + 1 tokens at most that overlap by one, all of it supervised."""
        ids = [*ids, self.end]
        starts = range(0, len(ids) - 1, self.max_length)
        pieces = (ids[at : at + self.max_length + 1] for at in starts)
        return [(piece, [1] * len(piece)) for piece in pieces]
