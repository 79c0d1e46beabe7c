"""Generation: KV cache, batches of prompts, sampling, streamed text."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.layout import Layout

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]


class KVCache:
    """Keys and values of all layers, preallocated.

    Attributes:
        kv: (n_layers, 2, rows, n_kv_heads, capacity, head_dim).
        row_ids: (rows,) int64, which rows of kv are in use; None: all of them, in their order.
        lengths: (rows,) int64 on the host, tokens that each row holds.
        longest: how much of `capacity` a pass looks at.
        prompt_rows: (copies, documents) int64, the rows that the next packed documents go to.
    """

    def __init__(self, config, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, 2, rows, config.n_kv_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.row_ids = None
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.longest = 0
        self.prompt_rows = torch.arange(rows).unsqueeze(0)

    def add(self, tokens: int, doc_lens: Tensor | None) -> Tensor:
        """Count new tokens: so many in each row, or the documents of a packed row.

        Returns:
            Their rows of kv, (rows * tokens,) int64 on the host, or (copies, sum of doc_lens).
        """
        if doc_lens is not None:
            self.lengths[self.prompt_rows] = doc_lens
            rows = self.prompt_rows.repeat_interleave(doc_lens, dim=1)
        else:
            self.lengths += tokens
            self.longest = int(self.lengths.max())
            rows = torch.arange(len(self.lengths)).repeat_interleave(tokens)
        return rows if self.row_ids is None else self.row_ids[rows]

    def write(self, layer: int, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Put k, v (B, n_kv_heads, T, head_dim) there: rows (copies, n) or (n,), positions (n,)."""
        for held, new in zip(self.kv[layer], (k, v), strict=True):
            new = new.transpose(1, 2).flatten(0, 1)[: len(positions)]  # (n, n_kv_heads, head_dim)
            held[rows, :, positions] = new.to(held.dtype)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, n_kv_heads, longest, head_dim) each."""
        kv = self.kv[layer, :, :, :, : self.longest]
        return (kv if self.row_ids is None else kv[:, self.row_ids]).unbind(0)

    def update(self, layer: int, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Take up the new tokens; returns the keys and values that they attend to."""
        self.write(layer, k, v, *layout.slots)
        return (k, v) if layout.doc_lens is not None else self.read(layer)

    def keep(self, rows: Tensor) -> None:
        """Forget all other rows. Those that are kept are not moved."""
        self.row_ids = rows if self.row_ids is None else self.row_ids[rows]
        self.lengths = self.lengths[rows]


class Decoder:
    """The forward passes of generation. `MiniMindLM.make_decoder` may name a faster one.

    Attributes:
        prefill_tokens: of prompts in one pass.
        keeps_rows: whether the rows of the cache must stay as many as they are.
    """

    prefill_tokens = 2048
    keeps_rows = False

    def __init__(self, model, cache: KVCache):
        self.model, self.cache = model, cache

    def step(self, token: Tensor) -> Tensor:
        """Logits (R, vocab) float32 behind token (R,) int64, one for each row of the cache."""
        return self.model(token.unsqueeze(1), cache=self.cache).logits.squeeze(1).float()

    def read(self, ids: Tensor, lens: list[int], last: Tensor) -> Tensor:
        """Logits (prompts, vocab) behind prompts packed into ids (1, N) that end at `last`."""
        return self.model(ids, doc_lens=lens, logits_at=last, cache=self.cache).logits.float()

    def read_pieces(self, ids: Tensor, layout: Layout, last: Tensor) -> Tensor:
        """As `read`, of pieces of prompts, each behind what its row of the cache holds."""
        return self.model(ids, layout=layout, logits_at=last).logits.float()


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


def make_sampler(
    prompts: list[list[int]],
    vocab_size: int,
    device: torch.device,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sampler:
    """The sampler of `generate_batch`: `sample`, with a penalty on tokens that occurred before.

    Source: Keskar et al., CTRL (2019), section 4.1, with the sign rule that keeps a penalty a
    penalty.
    """

    def sampler(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, generator)

    if repetition_penalty == 1.0:
        return sampler
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, ids] = True

    def penalising_sampler(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
        divided, multiplied = logits / repetition_penalty, logits * repetition_penalty
        penalised = torch.where(logits > 0, divided, multiplied)
        token = sampler(torch.where(seen[row], penalised, logits), row, position)
        seen[row, token] = True
        return token

    return penalising_sampler


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token per row of logits (B, vocab) float32; returns (B,) int64.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: among the k most probable tokens; 0: all.
        top_p: among the smallest set of probability >= p; 1: all.
    Source: top-p is nucleus sampling, Holtzman et al. (2020), eq. 3.
    """
    if temperature <= 0.0:
        return logits.max(dim=-1).indices  # three times as fast as argmax
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what comes before a token already suffices
        beyond[:, 0] = False
        beyond = torch.zeros_like(beyond).scatter(1, order, beyond)
        logits = logits.masked_fill(beyond, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def stream(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 512,
    eos_token_id: int | None = None,
    **sampling,
) -> Iterator[Tensor]:
    """Generate token by token.

    Args:
        model: a MiniMindLM.
        input_ids: (B, T) int64, prompts of unequal length padded on the left.
        attention_mask: (B, T) 0/1, needed where there is padding.
        max_new_tokens: at most so many; generation also ends when the context is full.
        eos_token_id: ends a row; a row that has ended yields eos until all have.
        sampling: temperature, top_k, top_p, generator: see `sample`. repetition_penalty: > 1 lowers
            the logits of tokens already in the context; 1: off.

    Yields: (B,) int64, the next token of every row.
    """
    B, T = input_ids.shape
    context = model.config.max_seq_len
    if T > context:
        raise ValueError(f"prompt of {T} tokens is longer than max_seq_len {context}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
    limits = [min(max_new_tokens, context - T)] * B
    sampler = make_sampler(prompts, model.config.vocab_size, input_ids.device, **sampling)
    steps = generate_batch(model, prompts, limits, sampler, eos_token_id, batch_size=B)
    for row, _, token in steps:
        tokens = input_ids.new_full((B,), 0 if eos_token_id is None else eos_token_id)
        tokens[row] = token
        yield tokens


def stream_text(
    model,
    decode: Callable[[list[int]], str],
    prompt: list[int],
    reply_ids: list[int] | None = None,
    **sampling,
) -> Iterator[str]:
    """The reply to a prompt, a piece per token, up to the end token, which is left out.

    A character whose bytes are spread over several tokens comes with its last one, the pieces
    before are empty: the reply so far is decoded as a whole, and what is new waits while its end is
    not yet a character.

    Args:
        model: a MiniMindLM.
        decode: ids of a reply -> its text.
        prompt: token ids.
        reply_ids: a list that the ids of the reply are appended to.
        sampling: the arguments of `stream`.
    """
    ids = [] if reply_ids is None else reply_ids
    text, shown = "", 0
    input_ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    for token in model.stream(input_ids, **sampling):
        if token.item() == sampling.get("eos_token_id"):
            break
        ids.append(token.item())
        text = decode(ids)
        whole = shown if text.endswith("\ufffd") else len(text)
        yield text[shown:whole]
        shown = whole
    yield text[shown:]
