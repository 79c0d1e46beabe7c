"""Outputs of engines to the event loop, without a wake-up for each token of each stream.

A request hears of its first token and of its end at once. Between, a stream is woken at most every
`STREAM_SECONDS` times the number of streams: one stream shows every token, and many share what a
core may spend on them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from runtime.serving.engine import Output
from runtime.serving.sampling import NewToken

NOTHING = Output([])
STREAM_SECONDS = 0.002  # what one chunk of one stream costs, some four times over


class Inbox:
    """What engines have sent to one request.

    Attributes:
        outputs: (number of the choice, output), not yet read.
        event: there are some that are to be read.
        is_live: somebody wants to see tokens as they come.
    """

    def __init__(self, mailbox: "Mailbox", is_live: bool):
        self.mailbox, self.is_live = mailbox, is_live
        self.outputs: deque[tuple[int, Output]] = deque()
        self.event = asyncio.Event()
        self.woken = 0.0

    def deliver(self, choice: int) -> Callable[[Output], None]:
        """What an engine calls with the outputs of a choice, on its thread."""

        def deliver(output: Output) -> None:
            self.outputs.append((choice, output))
            if output.finish_reason is None:
                if not self.is_live:
                    return
                now = time.monotonic()
                if now - self.woken < self.mailbox.interval:
                    return
                self.woken = now
            self.mailbox.wake(self)

        return deliver

    def take_by_choice(self) -> list[tuple[int, Output]]:
        """All that has come, as one output for each choice."""
        self.event.clear()
        tokens: dict[int, list[NewToken]] = {}
        ends: dict[int, Output] = {}
        for _ in range(len(self.outputs)):
            choice, output = self.outputs.popleft()
            tokens.setdefault(choice, []).extend(output.tokens)
            if output.finish_reason is not None:
                ends[choice] = output
        return [
            (choice, replace(ends.get(choice, NOTHING), tokens=new))
            for choice, new in tokens.items()
        ]


class Mailbox:
    """Wakes the tasks of requests, at most once a step.

    Attributes:
        streams: how many are live.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.streams = loop, 0
        self.ready: deque[Inbox] = deque()
        self.is_scheduled = False

    @property
    def interval(self) -> float:
        return 0.0 if self.streams < 2 else STREAM_SECONDS * self.streams

    def wake(self, inbox: Inbox) -> None:
        """For any thread."""
        self.ready.append(inbox)
        if not self.is_scheduled:
            self.is_scheduled = True
            self.loop.call_soon_threadsafe(self._set_events)

    def _set_events(self) -> None:
        self.is_scheduled = False  # first: what comes from now on schedules anew
        while self.ready:
            self.ready.popleft().event.set()
