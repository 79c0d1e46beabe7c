"""Generation for many prompts at once: a finished completion leaves its slot to the next prompt."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.kv_cache import Decoder, KVCache

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def generate_batch(
    model,
    prompts: list[list[int]],
    limits: list[int],
    sampler: Sampler,
    eos_token_id: int | None = None,
    samples: int = 1,
    batch_size: int = 64,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Complete prompts token by token; a finished one leaves its slot to the next prompt.

    Prompts are read in packs without padding, once for all their samples.

    Args:
        model: a MiniMindLM.
        prompts: token ids; prompt p has the rows p * samples to (p + 1) * samples - 1.
        limits: the most tokens for each prompt; with them it fits the model's max_seq_len.
        sampler: (logits (R, vocab) float32, row (R,), position (R,)) -> (R,) int64: the tokens at
            these positions of these rows' completions. Rows are in no order.
        eos_token_id: ends a completion.
        batch_size: prompts that are worked on at once.

    Yields:
        (row, position, token), (R,) int64 each: the next token of every row that goes on.
    """
    batch = Batch(model, prompts, limits, samples, batch_size)
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


class Batch:
    """The completions that are worked on, one in each slot.

    Attributes:
        row, position, left: (slots,) int64 on the host: which completion, tokens that it has, and
            tokens that it may still get; 0: the slot is empty.
        token, logits: (slots,) and (slots, vocab) on the device: the last token, what follows it.
        waiting: numbers of the prompts that have no slot yet.
    """

    def __init__(self, model, prompts, limits, samples: int, batch_size: int):
        self.prompts, self.limits, self.samples = prompts, limits, samples
        self.waiting = [number for number, limit in enumerate(limits) if limit > 0]
        self.waiting.sort(key=lambda number: -len(prompts[number]))  # neighbours: one length
        slots = samples * min(batch_size, len(self.waiting))
        longest = max((len(ids) + n for ids, n in zip(prompts, limits, strict=True)), default=0)
        self.device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        self.cache = KVCache(model.config, slots, longest, self.device, dtype)
        self.decoder = (model.make_decoder or Decoder)(model, self.cache)
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
        first = read_prompts(self.decoder, self.cache, [self.prompts[n] for n in new], slots.T)
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


def read_prompts(
    decoder: Decoder, cache: KVCache, prompts: list[list[int]], rows: Tensor
) -> Tensor:
    """Fill rows (copies, prompts) of the cache; returns the logits behind each prompt."""
    logits, begin, device = [], 0, cache.kv.device
    while begin < len(prompts):
        end, tokens = begin, 0
        while end < len(prompts) and (
            end == begin or tokens + len(prompts[end]) <= decoder.prefill_tokens
        ):
            tokens += len(prompts[end])
            end += 1
        lens = [len(ids) for ids in prompts[begin:end]]
        cache.prompt_rows = rows[:, begin:end]
        last = (torch.tensor(lens).cumsum(0) - 1).to(device)
        ids = torch.tensor([sum(prompts[begin:end], [])], device=device)
        logits.append(decoder.read(ids, lens, last))
        begin = end
    return torch.cat(logits)


def stream_rows(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    limit: int,
    eos_token_id: int | None,
    **sampling,
) -> Iterator[Tensor]:
    """As `generate.stream`, of several rows: (B,) int64, the next token of each.

    Args:
        limit: the most tokens of a row.
        sampling: see `sampling.make_sampler`.
    """
    from model.sampling import make_sampler

    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
    sampler = make_sampler(prompts, model.config.vocab_size, input_ids.device, **sampling)
    limits = [limit] * len(prompts)
    options = {"eos_token_id": eos_token_id, "batch_size": len(prompts)}
    for row, _, token in generate_batch(model, prompts, limits, sampler, **options):
        tokens = input_ids.new_full((len(prompts),), 0 if eos_token_id is None else eos_token_id)
        tokens[row] = token
        yield tokens
