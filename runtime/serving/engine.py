"""Continuous batching: requests join and leave a running batch between two steps.

A step of an engine does three things:

1. Waiting requests get free slots, rows of the KV cache. What a slot holds already of a prompt (the
   chat so far, a system prompt) is taken over or copied instead of read.
2. Prompts are read, a piece of so many tokens that those who stream hardly wait.
3. Every request whose prompt is read gets its next token.
"""

import itertools
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.kv_cache import Decoder, KVCache
from runtime.serving.prompt_pieces import Piece, read_pieces
from runtime.serving.sampling import Constraint, NewToken, Sampling, TokenSource, next_tokens

# So long a step may read prompts while others stream: a stream stutters where it is more, a request
# waits longer for its first token where it is less, and short pieces take more time for each token.
READING_SECONDS = 0.03
MIN_PIECE = 32  # tokens: less would read all weights for next to nothing
# A request waits while another reads a prompt that begins with so many more of its own tokens than
# any slot holds.
WORTH_WAITING = 16


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Output:
    """What a step gave one request.

    Attributes:
        tokens: without the end token.
        finish_reason: None; of the last one "stop" (an end token), "length", "cancelled", "refused"
            (by the constraint, which can say no more) or "error".
        error: why, of the last two.
    """

    tokens: list[NewToken]
    finish_reason: str | None = None
    error: str = ""


@dataclass
class Request:
    """What is asked of an engine.

    Attributes:
        prompt: ids; with max_new_tokens they fit the engine's context.
        ends: ids that end the reply.
        deliver: called on the engine's thread for every token; must return at once.
    """

    prompt: list[int]
    max_new_tokens: int
    ends: frozenset[int]
    sampling: Sampling
    deliver: Callable[[Output], None]
    constraint: Constraint | None = None


class Generation:
    """A request under way.

    Attributes:
        cached_tokens: of the prompt, taken from what others had read; known with the first output.
        generated: tokens so far.
        waits_for: (slot, who has it, how many tokens of this prompt it is to hold), while another
            request reads them.
        finished: there will be no further output.
    """

    def __init__(self, request: Request, vocab_size: int, device: torch.device):
        self.request = request
        self.prompt = np.array(request.prompt, dtype=np.int64)
        self.source = TokenSource(request.sampling, request.prompt, vocab_size, device)
        self.slot: Slot | None = None
        self.waits_for: tuple[Slot, Generation, int] | None = None
        self.cached_tokens = self.generated = 0
        self.finished = False

    def is_waiting_for_another(self) -> bool:
        if self.waits_for is None:
            return False
        slot, other, tokens = self.waits_for
        return slot.generation is other and slot.held < tokens


class Slot:
    """A row of the KV cache.

    Attributes:
        ids: (context,) int64; the first `held` are those whose keys and values the row holds.
        generation: who has it; None: free, what it holds can still be shared.
        token: the last one of the reply, which is not read yet.
        used: when it was last given away, a count.
    """

    def __init__(self, number: int, context: int):
        self.number, self.ids, self.held = number, np.zeros(context, dtype=np.int64), 0
        self.generation: Generation | None = None
        self.token, self.used = 0, 0

    def common(self, prompt: np.ndarray) -> int:
        """How many tokens of a prompt it holds, from the front."""
        return common_prefix(self.ids[: self.held], prompt)

    @property
    def is_reading(self) -> bool:
        return self.generation is not None and self.held < len(self.generation.prompt)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


class Engine:
    """The requests to one model. `submit` and `cancel` are for any thread, `step` for one.

    Args:
        model: a MiniMindLM, for evaluation.
        slots: requests that are worked on at once.
        context: tokens of a prompt with its reply, at most.
        max_waiting: requests that wait for a slot, at most.
    """

    def __init__(self, model, slots: int, context: int, max_waiting: int):
        weight = model.lm_head.weight
        self.model, self.context, self.max_waiting = model, context, max_waiting
        self.device, self.vocab_size = weight.device, model.config.vocab_size
        self.cache = KVCache(model.config, slots, context, weight.device, weight.dtype)
        self.decoder: Decoder = (model.make_decoder or Decoder)(model, self.cache)
        for kv in self.layers():
            kv.fill_(0.0)  # memory that is touched now cannot be missing later
        self.slots = [Slot(number, context) for number in range(slots)]
        self.waiting: deque[Generation] = deque()
        self.commands: queue.SimpleQueue[tuple[str, Generation]] = queue.SimpleQueue()
        self.wake: Callable[[], None] = lambda: None
        self.count = itertools.count(1)
        self.submitted = 0  # not yet in a slot
        self.lock = threading.Lock()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.token_seconds = 0.0  # what a token of a prompt took last time

    # ----------------------------------------------------------------------------------------------
    # For any thread
    # ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """Queue a request; its `deliver` hears of all that follows.

        Raises:
            QueueFull: too many wait already.
        """
        assert request.prompt and len(request.prompt) + request.max_new_tokens <= self.context
        generation = Generation(request, self.vocab_size, self.device)
        with self.lock:
            if self.submitted >= self.max_waiting + self.free:
                raise QueueFull(f"{self.max_waiting} requests wait already")
            self.submitted += 1
        self.commands.put(("submit", generation))
        self.wake()
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request before its next step; its last output says "cancelled"."""
        self.commands.put(("cancel", generation))
        self.wake()

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return sum(slot.generation is None for slot in self.slots)

    def layers(self) -> list[Tensor]:
        """Keys and values of each layer, (2, slots, n_kv_heads, context, head_dim)."""
        return [self.cache.kv[layer] for layer in range(self.model.config.n_layers)]

    @property
    def running(self) -> int:
        return len(self.slots) - self.free

    # ----------------------------------------------------------------------------------------------
    # A step
    # ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """Go on with all requests; returns whether there are any."""
        self.take_commands()
        self.fill_slots()
        self.read_prompts()
        self.generate()
        return bool(self.waiting) or self.running > 0

    def take_commands(self) -> None:
        while not self.commands.empty():
            command, generation = self.commands.get()
            if command == "submit":
                self.waiting.append(generation)
            elif not generation.finished:
                if generation.slot is None:
                    self.waiting.remove(generation)
                    self.leave_queue()
                self.finish(generation, Output([], "cancelled"))

    def leave_queue(self) -> None:
        with self.lock:
            self.submitted -= 1

    def finish(self, generation: Generation, output: Output) -> None:
        generation.finished = True
        if generation.slot is not None:
            generation.slot.generation = None
        generation.request.deliver(output)

    def fill_slots(self) -> None:
        """Give free slots to waiting requests, in their order."""
        for generation in list(self.waiting):
            if not self.free:
                return
            if generation.is_waiting_for_another():
                continue
            held = [slot.common(generation.prompt) for slot in self.slots]
            if self.is_being_read(generation, max(held)):
                continue
            self.waiting.remove(generation)
            self.leave_queue()
            self.take_slot(generation, held)

    def is_being_read(self, generation: Generation, held: int) -> bool:
        """Whether it pays to wait for a prompt that another request reads; notes which one."""
        for slot in self.slots:
            if slot.is_reading:
                soon = common_prefix(slot.generation.prompt, generation.prompt)
                if soon - held >= WORTH_WAITING:
                    generation.waits_for = slot, slot.generation, soon
                    return True
        return False

    def take_slot(self, generation: Generation, held: list[int]) -> None:
        """Give a request a free slot, with as much of its prompt as any slot holds.

        The slot that holds most is taken over, if it is free and all that it holds is wanted: a
        chat goes on. Else that much is copied to the free slot that was not used for longest.
        """
        best = self.slots[max(range(len(held)), key=held.__getitem__)]
        shared = min(held[best.number], len(generation.prompt) - 1)  # the last one gives the logits
        free = [slot for slot in self.slots if slot.generation is None]
        slot = min(free, key=lambda slot: (slot is best, slot.used))
        if best.generation is None and (shared == best.held or len(free) == 1):
            slot = best
        slot.ids[: len(generation.prompt)] = generation.prompt
        slot.held, slot.used, slot.generation = shared, next(self.count), generation
        generation.slot, generation.cached_tokens = slot, shared
        self.prompt_tokens += len(generation.prompt)
        self.cached_tokens += shared
        if shared and slot is not best:
            for kv in self.layers():
                kv[:, slot.number, :, :shared] = kv[:, best.number, :, :shared]

    def read_prompts(self) -> None:
        """Read a piece of the prompts that are not read yet, the oldest requests first."""
        reading = sorted((s for s in self.slots if s.is_reading), key=lambda slot: slot.used)
        if not reading:
            return
        room = self.reading_tokens(len(reading), self.running - len(reading))
        pieces = []
        for slot in reading:
            ids = slot.generation.prompt[slot.held :][:room].tolist()
            pieces.append(Piece(slot.number, slot.held, ids))
            room -= len(ids)
            if room <= 0:
                break
        started = time.perf_counter()
        logits = read_pieces(self.decoder, pieces)
        seconds = time.perf_counter() - started
        tokens = sum(len(piece.ids) for piece in pieces)
        if tokens >= 2 * MIN_PIECE or not self.token_seconds:  # of few tokens each takes longer
            self.token_seconds = seconds / tokens
        for piece in pieces:
            self.slots[piece.slot].held += len(piece.ids)
        rows = [n for n, piece in enumerate(pieces) if not self.slots[piece.slot].is_reading]
        if rows:
            self.take_tokens([self.slots[pieces[n].slot] for n in rows], logits[rows])

    def reading_tokens(self, reading: int, streaming: int) -> int:
        """How many tokens of prompts the next step may read, for so many of both kinds."""
        most = self.decoder.prefill_tokens
        if not streaming:
            return most
        seconds = READING_SECONDS * min(max(1.0, reading / streaming), 2.0)
        tokens = seconds / self.token_seconds if self.token_seconds else MIN_PIECE
        return int(min(most, max(MIN_PIECE, tokens // MIN_PIECE * MIN_PIECE)))

    def generate(self) -> None:
        """One step of the model for every request whose prompt is read."""
        active = [s for s in self.slots if s.generation is not None and not s.is_reading]
        if not active:
            return
        rows = self.slots if self.decoder.keeps_rows else active
        # A row that takes part without a request writes behind what it holds.
        held = [min(slot.held, self.context - 1) for slot in rows]
        self.cache.lengths = torch.tensor(held)
        numbers = torch.tensor([slot.number for slot in rows], device=self.device)
        self.cache.row_ids = None if self.decoder.keeps_rows else numbers
        tokens = torch.tensor([slot.token for slot in rows], device=self.device)
        logits = self.decoder.step(tokens)
        for slot in active:
            slot.ids[slot.held] = slot.token
            slot.held += 1
        if len(rows) > len(active):
            logits = logits[[slot.number for slot in active]]
        self.take_tokens(active, logits)

    def take_tokens(self, slots: list[Slot], logits: Tensor) -> None:
        """Choose the next tokens of these requests from logits (R, vocab), and deliver them."""
        generations = [slot.generation for slot in slots]
        sources = [generation.source for generation in generations]
        constraints = [generation.request.constraint for generation in generations]
        tokens = next_tokens(logits, sources, constraints)
        for slot, generation, token in zip(slots, generations, tokens, strict=True):
            request = generation.request
            if request.constraint is not None and request.constraint.error:
                self.finish(generation, Output([], "refused", request.constraint.error))
                continue
            if token.id in request.ends:
                self.finish(generation, Output([], "stop"))
                continue
            if request.constraint is not None:
                request.constraint.advance(token.id)
            slot.token = token.id
            generation.generated += 1
            self.generated_tokens += 1
            if generation.generated == request.max_new_tokens:
                self.finish(generation, Output([token], "length"))
            else:
                request.deliver(Output([token]))

    def fail(self, error: str) -> None:
        """End all requests with an error; what the slots hold is not trusted any more."""
        self.take_commands()
        for generation in [*self.waiting, *(s.generation for s in self.slots if s.generation)]:
            if generation.slot is None:
                self.leave_queue()
            self.finish(generation, Output([], "error", error))
        self.waiting.clear()
        for slot in self.slots:
            slot.held = 0


class EngineThread:
    """The thread that opens models and steps their engines.

    All that computes runs on it. GNU's OpenMP keeps threads for each thread that computes; once there
    are more of them than cores they sleep where they else would spin, and a step takes half as long
    again.
    """

    def __init__(self):
        self.executor = ThreadPoolExecutor(1, "engines")
        self.engines: list[Engine] = []
        self.closing, self.event = False, threading.Event()

    def call(self, function: Callable, *args):
        """What a function returns on this thread; before `start`."""
        return self.executor.submit(function, *args).result()

    def start(self, engines: list[Engine]) -> None:
        """Step engines in turn whenever any has requests."""
        self.engines = engines
        for engine in engines:
            engine.wake = self.event.set
        self.executor.submit(self.run)

    def run(self) -> None:
        while not self.closing:
            self.event.clear()
            # A list: each engine takes its step, whatever the first one says.
            if not any([self.step(engine) for engine in self.engines]) and not self.closing:
                self.event.wait()

    def step(self, engine: Engine) -> bool:
        try:
            return engine.step()
        except Exception as error:  # a fault of ours or the machine's must not end the server
            traceback.print_exc()
            engine.fail(f"{type(error).__name__}: {error}".splitlines()[0])
            return True

    def close(self) -> None:
        """End after the step under way; requests that are under way get an error."""
        self.closing = True
        self.event.set()
        self.executor.shutdown()
        for engine in self.engines:
            engine.fail("the server is shutting down")
