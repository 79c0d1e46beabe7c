"""A conversation with a model that goes on: prompts in which its replies stand as it wrote them."""

from collections.abc import Sequence

from dataset.chat_format import ChatCoder


class Talk:
    """A conversation, turn by turn.

    A prompt repeats the one before, the reply to it and what came since. Where it does, to the
    letter, so do its ids: the same text can be spelled in other tokens than the model took. Where
    the chat template changes what was said (drops old thinking, say), all is encoded again.

    Attributes:
        messages: what was said, the model's replies included.
    """

    def __init__(
        self, coder: ChatCoder, tools: list[dict] | None = None, thinking: bool | None = None
    ):
        self.coder, self.tools, self.thinking = coder, tools, thinking
        self.opening = coder.opening(thinking)
        self.messages: list[dict] = []
        self._text, self._ids = "", []  # of the last prompt with its reply

    def prompt(self, messages: list[dict], dropped: int = 0) -> list[int]:
        """Ids of what was said with these turns behind it, up to where the model is to speak.

        Args:
            dropped: so many of the turns that were said are left out, from the front, but for a
                system turn.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        text = self._prompt_text(messages, dropped)
        behind = text[len(self._text) :]
        if self._text and text.startswith(self._text) and behind.startswith(self.coder.end_names):
            return [*self._ids, *self.coder.plain(behind)]
        return self.coder.plain(text)

    def add(self, messages: list[dict], reply: Sequence[int], dropped: int = 0) -> None:
        """Go on with these turns and the reply to them: ids without an end-of-turn token."""
        ids = [*self.prompt(messages, dropped), *reply]
        said = self.coder.decode_reply(reply)
        self._text = self._prompt_text(messages, dropped) + self.coder.plain.rename(said)
        self._ids = ids
        answer = {"role": "assistant", "content": self.opening + said, "from_model": True}
        self.messages = [*self._kept(dropped), *messages, answer]

    def _prompt_text(self, messages: list[dict], dropped: int) -> str:
        turns = [*self._kept(dropped), *messages]
        return self.coder.prompt_text(turns, self.tools, self.thinking)

    def _kept(self, dropped: int) -> list[dict]:
        begin = int(bool(self.messages) and self.messages[0]["role"] == "system")
        return [*self.messages[:begin], *self.messages[begin + dropped :]]
