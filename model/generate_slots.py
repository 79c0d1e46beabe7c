"""The general form of `generate_batch`: a finished completion leaves its slot to the next prompt.

For more prompts than are worked on at once, and for a decoder whose rows must stay as many.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.kv_cache import Decoder
from model.read_prompts import read_prompts


def generate_slots(
    decoder: Decoder,
    prompts: list[list[int]],
    limits: list[int],
    numbers: list[int],
    sampler: Callable[[Tensor, Tensor, Tensor], Tensor],
    eos_token_id: int | None,
    samples: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields what `generate_batch` does, whose arguments these are.

    Args:
        decoder: with a cache of as many rows as there are slots.
        numbers: of the prompts that want tokens, in the order in which they get slots.
    """
    batch = Slots(decoder, prompts, limits, numbers, samples)
    ahead = batch.device.type == "cuda"  # which copies what is not pinned before it returns
    while True:
        batch.step()
        batch.fill_slots()
        slots = (batch.left > 0).nonzero().squeeze(1)
        if not len(slots):
            return
        row, position = (
            part[slots].to(batch.device, non_blocking=ahead) for part in (batch.row, batch.position)
        )
        all_slots = len(slots) == len(batch.left)
        on_device = slice(None) if all_slots else slots.to(batch.device, non_blocking=ahead)
        token = sampler(batch.logits[on_device], row, position)
        yield row, position, token
        batch.token[on_device] = token
        batch.position[slots] += 1
        batch.left[slots] -= 1
        if eos_token_id is not None:
            batch.left[slots[(token == eos_token_id).cpu()]] = 0
        batch.drop_slots()


class Slots:
    """The completions that are worked on, one in each slot.

    Attributes:
        row, position, left: (slots,) int64 on the host: which completion, tokens that it has, and
            tokens that it may still get; 0: the slot is empty.
        token, logits: (slots,) and (slots, vocab) on the device: the last token, what follows it.
        waiting: numbers of the prompts that have no slot yet.
    """

    def __init__(self, decoder: Decoder, prompts, limits, waiting: list[int], samples: int):
        self.decoder, self.cache, self.device = decoder, decoder.cache, decoder.cache.kv.device
        self.prompts, self.limits, self.waiting = prompts, limits, waiting
        self.samples, slots = samples, len(decoder.cache.lengths)
        self.row, self.position, self.left = torch.zeros(3, slots, dtype=torch.int64)
        self.token = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.logits = None

    def step(self) -> None:
        """Read the last tokens. An empty slot takes part, but holds nothing."""
        active = self.left > 0
        if active.any():
            self.cache.lengths[~active] = 0
            self.logits = self.decoder.step(self.token)

    def fill_slots(self) -> None:
        """Read prompts into the empty slots."""
        samples, slots = self.samples, (self.left == 0).nonzero().squeeze(1)
        room = len(slots) // samples
        new, self.waiting = self.waiting[:room], self.waiting[room:]
        if not new:
            return
        slots = slots[: len(new) * samples].view(-1, samples)
        first = read_prompts(self.decoder, [self.prompts[n] for n in new], slots.T)
        if self.logits is None:
            self.logits = first.new_zeros(len(self.left), first.size(1))
        self.logits[slots.flatten().to(self.device)] = first.repeat_interleave(samples, dim=0)
        self.row[slots] = torch.tensor(new).unsqueeze(1) * samples + torch.arange(samples)
        self.left[slots] = torch.tensor([self.limits[n] for n in new]).unsqueeze(1)
        self.position[slots] = 0

    def drop_slots(self) -> None:
        """Give up the slots that no prompt will take."""
        slots = (self.left > 0).nonzero().squeeze(1)
        if self.decoder.keeps_rows or self.waiting or len(slots) == len(self.left):
            return
        self.cache.keep(slots)
        self.row, self.position, self.left = (
            part[slots] for part in (self.row, self.position, self.left)
        )
        self.token = self.token[slots.to(self.device)]
