"""A chat in the terminal: what the user types, as prompts that hold all that was said before."""

import contextlib
import sys
from collections.abc import Iterator

from dataset.talk import Talk
from runtime.chat_model import ChatModel


class Conversation:
    """The user's side of a chat; the reply to each of its prompts comes back by `add`.

    Args:
        model: with a chat template.
        system: the turn that it begins with, or nothing.
    """

    def __init__(self, model: ChatModel, system: list[dict]):
        self.model, self.system = model, system
        self.interactive = sys.stdin.isatty()
        self.interrupted = False  # by Ctrl-C: another one leaves
        self.begin()
        if self.interactive:
            with contextlib.suppress(ImportError):  # Windows' own terminal does it by itself
                import readline  # noqa: F401  # arrow keys and history in input()

    def begin(self) -> None:
        self.talk = Talk(self.model.coder, None, self.model.thinking)
        self.question, self.dropped = [], 0  # of the last prompt

    def prompts(self) -> Iterator[list[int]]:
        """The ids of each prompt, until /exit, the end of the input, or Ctrl-C twice."""
        for line in read_input(self.interactive):
            if line is None:
                if self.interrupted:
                    raise KeyboardInterrupt
                print("\n(Ctrl-C again or /exit leaves)", flush=True)
                self.interrupted = True
                continue
            text, self.interrupted = line.strip(), False
            if text == "/exit":
                return
            if text == "/clear":
                self.begin()
                print("(the conversation starts anew)", flush=True)
            elif text:
                question = [{"role": "user", "content": text}]
                self.question = question if self.talk.messages else [*self.system, *question]
                try:
                    prompt, self.dropped = self.fit()
                except ValueError as error:
                    print(f"({error})", flush=True)
                    continue
                if self.dropped:
                    oldest = f"the oldest {self.dropped} turn{'s' * (self.dropped > 1)}"
                    print(f"(the context is full: dropped {oldest})", flush=True)
                yield prompt

    def fit(self) -> tuple[list[int], int]:
        """Drop turns from the front until the prompt leaves a quarter of the context for a reply.

        The system turn is never dropped.

        Returns:
            The ids of the prompt, and how many questions with their replies were dropped.

        Raises:
            ValueError: the question alone does not fit.
        """
        context, longest = self.model.context, self.model.sampling["max_new_tokens"]
        room = context - min(longest, context // 4)
        prompt, dropped = self.talk.prompt(self.question), 0
        while len(prompt) > room and 2 * (dropped + 1) <= len(self.talk.messages):
            dropped += 1
            prompt = self.talk.prompt(self.question, 2 * dropped)
        return self.model.check(prompt), dropped

    def add(self, reply: list[int], interrupted: bool) -> None:
        """Go on with the reply to the last prompt, which Ctrl-C may have cut short."""
        self.talk.add(self.question, reply, 2 * self.dropped)
        self.interrupted = interrupted


def read_input(interactive: bool) -> Iterator[str | None]:
    """What the user types, line by line; None for Ctrl-C. Ends with the input."""
    while True:
        try:
            line = input("you> ") if interactive else sys.stdin.readline()
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            yield None
            continue
        if not interactive:
            if not line:
                return
            print(f"you> {line.rstrip()}", flush=True)  # so that the output reads as a conversation
        yield line
