"""What a row of conversations becomes for supervised fine-tuning."""

from dataset.chat_encoder import ChatEncoder
from dataset.plain_rows import plain_format, plain_messages


class SFTEncoder:
    """A `cache_builder.Encoder`; the arguments are those of `lm_dataset.SFTDataset`."""

    def __init__(self, tokenizer, max_length: int, loss_on: str):
        self.coder = ChatEncoder(tokenizer)
        self.max_length = max_length
        self.loss_on = loss_on
        self.format = None

    def parse(self, row: object):
        """The conversation of a row; the first one says which format all of them have."""
        self.format = self.format or plain_format(row)
        messages, tools = plain_messages(row, self.format), None
        if not messages:
            from dataset.chat_rows import detect_format, normalise_row

            self.format = self.format or detect_format(row)
            messages, tools = normalise_row(row, self.format)
        return self.coder.read_chat(messages, tools, self.loss_on)

    def encode(self, chats: list) -> list[tuple[list, bool]]:
        results, size = [], self.max_length + 1
        for ids, mask in self.coder.encode(chats):
            truncated = len(ids) > size
            ids, mask = ids[:size], mask[:size]
            results.append(([(ids, mask)] if 1 in mask else [], truncated))
        return results
