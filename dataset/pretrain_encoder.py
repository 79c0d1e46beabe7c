"""What a document becomes for pretraining."""

from dataset.text_encoder import text_encoder

END_OF_TEXT = "<|endoftext|>"  # stands between the documents


def end_of_text(tokenizer) -> int:
    """The id of the token that stands between documents."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    unknown = end is None or end == tokenizer.unk_token_id
    return tokenizer.eos_token_id if unknown else end


class PretrainEncoder:
    """A `cache_builder.Encoder`; the arguments are those of `lm_dataset.PretrainDataset`."""

    def __init__(self, tokenizer, max_length: int):
        self.end = end_of_text(tokenizer)
        self.plain = text_encoder(tokenizer)
        self.max_length = max_length

    def parse(self, row: object) -> str | None:
        """The text of a row, or None: it says not to learn from it."""
        if isinstance(row, str):
            return row
        if not isinstance(row, dict):
            shape = 'a row must be an object {"text": ...}'
            raise ValueError(f"{shape}, found {type(row).__name__}")
        if not isinstance(row.get("text"), str):
            keys = ", ".join(list(row)[:5]) or "none"
            raise ValueError(f'a pretraining row needs a string under "text"; keys found: {keys}')
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
