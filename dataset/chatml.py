"""Our own chat template written directly: a conversation of roles and texts, prompts too.

In the text, control tokens have random names. Tools, thinking and every other template are for
`template_reader.py`, which gives the same for these.
"""

from dataclasses import dataclass

from dataset.our_template import END, ROLES, SAMPLE, START, is_ours
from dataset.text_encoder import TextEncoder

FIELDS = {"role", "content", "loss", "from_model"}  # of a message that is written here


@dataclass(frozen=True)
class Mark:
    """A span in tokens: behind control token `after` and the ids `head`, up to token `end`."""

    after: int
    head: list[int]
    end: int


@dataclass
class Chat:
    """A conversation as text, ready to be encoded, and what assistant turns say in it.

    spans: number of a turn -> (begin, end) in characters, its end-of-turn token included; the same
        in tokens, where that is known, by the numbers of control tokens in the text.
    controls: their ids.
    """

    text: str
    spans: dict[int, tuple[int, int, Mark | None]]
    controls: list[int]


class ChatML:
    """Writes conversations as our template does; in the text, control tokens have random names."""

    def __init__(self, encoder: TextEncoder):
        self.rename = encoder.rename
        self.heads = {role: encoder.rename(f"{START}{role}\n") for role in ROLES}
        self.end = encoder.rename(END)
        self.controls = [encoder.ids[START], encoder.ids[END]]  # of a turn
        self.assistant_ids = encoder(self.heads["assistant"])[1:]

    def can_write(self, messages: list[dict], tools: list[dict] | None) -> bool:
        """Whether there is nothing but roles and texts, and no thinking in them."""
        return not tools and all(
            message.keys() <= FIELDS
            and message["role"] in self.heads
            and isinstance(message.get("content"), str)
            and (message.get("from_model") or "</think>" not in message["content"])
            for message in messages
        )

    def write(
        self, messages: list[dict], add_generation_prompt=False, enable_thinking=False
    ) -> Chat:
        """The text of a conversation, and where in it the assistant speaks."""
        text, spans = "", {}
        for n, message in enumerate(messages):
            content = message["content"]
            if message.get("from_model"):  # it wrote its control tokens itself
                content = self.rename(content)
            text += self.heads[message["role"]]
            begin = len(text)
            text += content + self.end
            if message["role"] == "assistant":
                spans[n] = begin, len(text), Mark(2 * n, self.assistant_ids, 2 * n + 1)
            text += "\n"
        if add_generation_prompt:
            text += self.heads["assistant"] + self.rename(self.opening(enable_thinking))
        return Chat(text, spans, self.controls * len(messages))

    def opening(self, thinking: bool | None) -> str:
        """What a prompt says already of the reply."""
        return "<think>\n" if thinking else ""


def chatml_of(tokenizer, encoder: TextEncoder) -> ChatML | None:
    """What writes a tokenizer's conversations, if its chat template is ours; else None."""
    if not is_ours(tokenizer.chat_template) or not {START, END} <= encoder.ids.keys():
        return None
    chatml = ChatML(encoder)
    ids = tokenizer.apply_chat_template(SAMPLE, return_dict=False)
    return chatml if encoder(chatml.write(SAMPLE).text) == ids else None
