"""Generation: the cache of keys and values, completing prompts, drawing the next token, turning tokens into text."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.cpu_decoder import CpuDecoder, suits
from model.decode_graph import DecodeGraph
from model.ops import autocast_dtype

PREFILL = {"cpu": 2048, "cuda": 16384}  # tokens of prompts in a pass: more would only outgrow a CPU's own cache


class KVCache:
    """Keys and values of all layers, preallocated: kv (n_layers, 2, rows, n_kv_heads, capacity, head_dim)."""

    def __init__(self, config, rows: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, 2, rows, config.n_kv_heads, capacity, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.where = None  # (rows,) int64, the part of kv that is each row's; None: all, in their order
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # tokens that each row holds, on the CPU
        self.longest = 0  # places that a pass looks at: those of the longest row
        self.filled = torch.arange(rows).unsqueeze(0)  # (copies, documents): the rows that packed documents go to

    def write(self, layer: int, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Put k, v (B, n_kv_heads, T, head_dim) there: rows (copies, n) or (n,), positions (n,), n = B * T at most."""
        rows = rows if self.where is None else self.where[rows]
        for held, new in zip(self.kv[layer], (k, v), strict=True):
            held[rows, :, positions] = new.transpose(1, 2).flatten(0, 1)[: len(positions)].to(held.dtype)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, n_kv_heads, longest row, head_dim) each."""
        kv = self.kv[layer, :, :, :, : self.longest]
        return (kv if self.where is None else kv[:, self.where]).unbind(0)

    def keep(self, rows: Tensor) -> None:
        """Forget all other rows, on a CPU. Those that are kept are not moved."""
        self.where, self.lengths = rows if self.where is None else self.where[rows], self.lengths[rows]


@torch.no_grad()
def complete(
    model,
    prompts: list[list[int]],
    limits: list[int],
    choose: Callable[[Tensor, Tensor, Tensor], Tensor],
    end: int | None = None,
    samples: int = 1,
    batch_size: int = 64,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Complete prompts token by token. A completion that has ended leaves, and the next prompt takes its place.

    Prompts are read in packs without padding, once for all their samples.

    Args:
        model: a MiniMindLM.
        prompts: token ids; the samples of prompt p are the rows p * samples to (p + 1) * samples - 1.
        limits: the most tokens for each prompt; prompt and completion fit the model's max_seq_len.
        choose: (logits (R, vocab) float32, row (R,), place (R,)) -> (R,) int64: the tokens that stand at these places
            of these rows' completions. Rows are in no order.
        end: the token that ends a completion.
        batch_size: prompts that are worked on at once.

    Yields: (row, place, token), (R,) int64 each: the next token of every row that goes on.
    """
    device, waiting = model.lm_head.weight.device, [number for number, limit in enumerate(limits) if limit > 0]
    waiting.sort(key=lambda number: -len(prompts[number]))  # neighbours of one length are read and attended to together
    size = samples * min(batch_size, len(waiting))
    capacity = max((len(ids) + limit for ids, limit in zip(prompts, limits, strict=True)), default=0)
    cache = KVCache(model.config, size, capacity, device, autocast_dtype(model.lm_head.weight))
    step, read = passes(model, cache)
    row, place, left = torch.zeros(3, size, dtype=torch.int64)  # what each seat works on, how far it is, what is left
    token, logits = torch.zeros(size, dtype=torch.int64, device=device), None
    while True:
        # 1. One more token for those that go on. An empty seat costs its share of the pass, but may hold nothing.
        going = left > 0
        if going.any():
            cache.lengths[~going] = 0
            logits = step(token)

        # 2. Prompts for the empty seats
        seats = (~going).nonzero().squeeze(1)
        new, waiting = waiting[: len(seats) // samples], waiting[len(seats) // samples :]
        if new:
            seats = seats[: len(new) * samples].view(-1, samples)
            first = read_prompts(read, cache, [prompts[number] for number in new], seats.T)
            logits = first.new_zeros(size, first.size(1)) if logits is None else logits
            logits[seats.flatten().to(device)] = first.repeat_interleave(samples, dim=0)
            numbers = torch.tensor(new).unsqueeze(1)
            row[seats], place[seats] = numbers * samples + torch.arange(samples), 0
            left[seats] = torch.tensor([limits[number] for number in new]).unsqueeze(1)

        # 3. The next token of each
        seats = (left > 0).nonzero().squeeze(1)
        if not len(seats):
            return
        where = [numbers[seats].to(device, non_blocking=True) for numbers in (row, place)]
        taken = slice(None) if len(seats) == size else seats.to(device, non_blocking=True)
        chosen = choose(logits[taken], *where)
        yield *where, chosen
        token[taken] = chosen
        place[seats] += 1
        left[seats] -= 1
        if end is not None:
            left[seats[(chosen == end).cpu()]] = 0

        # 4. Seats that nobody will take are given up, where they cost time: not on a GPU
        seats = (left > 0).nonzero().squeeze(1)
        if device.type == "cpu" and not waiting and len(seats) < size:
            cache.keep(seats)
            row, place, left, token, size = row[seats], place[seats], left[seats], token[seats.to(device)], len(seats)


def passes(model, cache: KVCache) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, list, Tensor], Tensor]]:
    """A step and a reader of prompts, for the rows of a cache.

    Returns:
        step: token (R,) -> the logits behind it, (R, vocab) float32.
        read: ids (1, N), lengths of the prompts packed there, the places of their last tokens -> the logits at those.
    """

    def read(ids: Tensor, lens: list[int], last: Tensor) -> Tensor:
        return model(ids, doc_lens=lens, logits_at=last, cache=cache).logits.float()

    if cache.kv.device.type == "cuda":
        return DecodeGraph(model, cache), read
    if suits(model, cache.kv.dtype):
        decoder = CpuDecoder(model, cache)
        return decoder, decoder.read
    return lambda token: model(token.unsqueeze(1), cache=cache).logits.squeeze(1).float(), read


def read_prompts(read: Callable, cache: KVCache, prompts: list[list[int]], rows: Tensor) -> Tensor:
    """Fill rows (copies, prompts) of the cache; returns the logits behind each prompt, (prompts, vocab) float32."""
    logits, begin, device = [], 0, cache.kv.device
    most = PREFILL[device.type]
    while begin < len(prompts):
        end, tokens = begin, 0
        while end < len(prompts) and (end == begin or tokens + len(prompts[end]) <= most):
            tokens += len(prompts[end])
            end += 1
        pack, lens = sum(prompts[begin:end], []), [len(ids) for ids in prompts[begin:end]]
        cache.filled = rows[:, begin:end]
        last = (torch.tensor(lens).cumsum(0) - 1).to(device)
        ids = torch.tensor([pack], device=device)
        logits.append(read(ids, lens, last))
        begin = end
    return torch.cat(logits)


def sampler(
    prompts: list[list[int]],
    vocab_size: int,
    device: torch.device,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What `complete` chooses tokens with: `sample`, after a penalty on what stands in a prompt and its completion.

    Source: Keskar et al., CTRL (2019), section 4.1, with the sign rule that keeps a penalty a penalty.
    """

    def choose(logits: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return sample(logits, temperature, top_k, top_p, generator)

    if repetition_penalty == 1.0:
        return choose
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, ids] = True

    def choose_less_seen(logits: Tensor, row: Tensor, place: Tensor) -> Tensor:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        token = choose(torch.where(seen[row], penalised, logits), row, place)
        seen[row, token] = True
        return token

    return choose_less_seen


def sample(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a token per row of logits (B, vocab) float32; returns (B,) int64.

    Source: top-p is nucleus sampling, Holtzman et al. (2020), eq. 3: the smallest set of probability >= top_p.
    """
    if temperature <= 0.0:
        return logits.max(dim=-1).indices  # argmax takes three times as long on a CPU
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -math.inf)
    if top_p < 1.0:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what comes before a token already suffices
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def stream_text(
    model, decode: Callable[[list[int]], str], prompt: list[int], written: list[int] | None = None, **sampling
) -> Iterator[str]:
    """The reply to a prompt, a piece per token, up to the end token, which is left out.

    A character whose bytes are spread over several tokens comes with its last one, the pieces before are empty: the
    reply so far is decoded as a whole, and what is new waits while its end is not yet a character.

    Args:
        model: a MiniMindLM.
        decode: ids of a reply -> its text.
        prompt: token ids.
        written: a list that the ids of the reply are appended to.
        sampling: the arguments of `MiniMindLM.stream`.
    """
    ids, text, shown = [] if written is None else written, "", 0
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
