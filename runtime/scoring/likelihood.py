"""Log-probabilities of texts behind texts: what choices, bits per byte and lm-eval are made of."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.kv_cache import KVCache

MAX_TOKENS = 4096  # of one pass, unless a single prompt has more
MAX_LOGITS = 2**27  # of one pass: 512 MiB in float32


class Continuation(NamedTuple):
    """Token ids, and those before them, of which there is at least one."""

    context: Sequence[int]
    ids: Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation: natural log of its probability, and whether greedy search writes it."""

    logprob: float
    is_greedy: bool


class Prompt(NamedTuple):
    """A context, and the continuations behind it with their numbers."""

    context: tuple[int, ...]
    continuations: list[Sequence[int]]
    numbers: list[int]

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))


@torch.no_grad()
def score_continuations(
    model, continuations: Sequence[Continuation], advance: Callable[[int], object] | None = None
) -> list[Likelihood]:
    """The likelihood of each continuation behind its context.

    A context is read once for all its continuations. Documents are packed without padding.

    Args:
        model: a MiniMindLM; a context with its continuation fits max_seq_len + 1 tokens.
        advance: called with how many continuations were scored since.
    """
    prompts: dict[tuple[int, ...], Prompt] = {}
    for number, (context, ids) in enumerate(continuations):
        assert len(context) and len(ids), "a context and a continuation have a token at least"
        prompt = prompts.setdefault(tuple(context), Prompt(tuple(context), [], []))
        prompt.continuations.append(ids)
        prompt.numbers.append(number)
    likelihoods = [Likelihood(0.0, True)] * len(continuations)
    for batch in make_batches(prompts.values(), model.config):
        targets = [ids for prompt in batch for ids in prompt.continuations]
        numbers = [number for prompt in batch for number in prompt.numbers]
        read = read_shared if len(batch[0].numbers) > 1 else read_alone
        for number, likelihood in zip(numbers, judge(*read(model, batch), targets), strict=True):
            likelihoods[number] = likelihood
        if advance:
            advance(len(numbers))
    return likelihoods


def make_batches(prompts: Iterable[Prompt], config) -> Iterator[list[Prompt]]:
    """Prompts for one pass each, all with one continuation or all with several.

    The longest come first: memory that does not suffice shows at once.
    """
    batch: list[Prompt] = []
    order = sorted(prompts, key=lambda p: (len(p.numbers) > 1, -len(p.context), -p.longest))
    for prompt in order:
        more = [*batch, prompt]
        same = len({len(one.numbers) > 1 for one in more}) == 1
        if batch and not (same and fits(more, config)):
            yield batch
            more = [prompt]
        batch = more
    if batch:
        yield batch


def fits(batch: list[Prompt], config) -> bool:
    """Whether one pass takes these prompts."""
    rows, longest = sum(len(prompt.numbers) for prompt in batch), max(p.longest for p in batch)
    tokens = sum(len(prompt.context) for prompt in batch) + rows * longest
    context = max(len(prompt.context) for prompt in batch) + longest - 1
    is_short = context <= config.max_seq_len or len(batch) == 1
    return is_short and tokens <= MAX_TOKENS and rows * longest * config.vocab_size <= MAX_LOGITS


def read_alone(model, batch: list[Prompt]) -> tuple[Tensor, list[int]]:
    """Read contexts with their only continuations.

    Returns:
        logits (K, vocab), and for each token of the continuations the row that predicts it.
    """
    documents = [[*prompt.context, *prompt.continuations[0][:-1]] for prompt in batch]
    positions, end = [], 0
    for prompt, document in zip(batch, documents, strict=True):
        end += len(document)
        positions += range(end - prompt.longest, end)
    return read_packed(model, documents, positions), list(range(len(positions)))


def read_shared(model, batch: list[Prompt]) -> tuple[Tensor, list[int]]:
    """As `read_alone`, with several continuations each: contexts first, then what follows them."""
    lens = [len(prompt.context) for prompt in batch]
    counts = [len(prompt.numbers) for prompt in batch]
    continuations = [ids for prompt in batch for ids in prompt.continuations]
    document_of = [d for d, count in enumerate(counts) for _ in range(count)]
    last = [sum(lens[: d + 1]) - 1 for d in range(len(batch))]
    contexts = [prompt.context for prompt in batch]
    width = max(map(len, continuations)) - 1
    if not width:  # letters, for example
        return read_packed(model, contexts, last), document_of
    weight = model.lm_head.weight
    capacity = max(lens) + width
    cache = KVCache(model.config, len(continuations), capacity, weight.device, weight.dtype)
    cache.prompt_rows = rows_of_prompts(counts)
    first = read_packed(model, contexts, last, cache)
    ids = torch.zeros(len(continuations), width, dtype=torch.int64)
    positions, rows = [], []
    for n, continuation in enumerate(continuations):
        length = len(continuation) - 1
        ids[n, :length] = torch.tensor(continuation[:-1])
        rows += [
            document_of[n],
            *range(len(batch) + len(positions), len(batch) + len(positions) + length),
        ]
        positions += range(n * width, n * width + length)
    at = torch.tensor(positions, device=weight.device)
    rest = model(ids.to(weight.device), cache=cache, logits_at=at).logits
    return torch.cat((first, rest)), rows


def rows_of_prompts(counts: list[int]) -> Tensor:
    """The rows of the cache that each prompt goes to, (copies, prompts).

    Prompts that have fewer than the others name their last row again.
    """
    begins = torch.tensor([0, *counts[:-1]]).cumsum(0)
    copies = torch.arange(max(counts)).unsqueeze(1)
    return begins + torch.minimum(copies, torch.tensor(counts) - 1)


def read_packed(model, documents: Sequence, positions: list[int], cache=None) -> Tensor:
    """Logits (K, vocab) at positions of documents that are packed into a row."""
    device = model.lm_head.weight.device
    ids = torch.tensor([[token for document in documents for token in document]], device=device)
    at = torch.tensor(positions, device=device)
    return model(ids, doc_lens=list(map(len, documents)), logits_at=at, cache=cache).logits


def judge(logits: Tensor, rows: list[int], targets: list[Sequence[int]]) -> list[Likelihood]:
    """Likelihoods of continuations.

    Args:
        logits: (K, vocab). rows: for each token of all of them, the row that predicts it.
        targets: the continuations.
    """
    logits, at = logits.float(), torch.tensor(rows, device=logits.device)
    tokens = torch.tensor([token for ids in targets for token in ids], device=logits.device)
    normaliser = logits.logsumexp(dim=-1)  # (K,)
    best = logits.max(dim=-1).indices
    logprobs = (logits[at, tokens] - normaliser[at]).cpu().double()  # (N,)
    is_best = (best[at] == tokens).cpu()
    sizes = list(map(len, targets))
    parts = zip(logprobs.split(sizes), is_best.split(sizes), strict=True)
    return [Likelihood(float(part.sum()), bool(best.all())) for part, best in parts]


def text_begin(tokenizer) -> list[int]:
    """The token that a tokenizer puts before a text: Llama's does, Qwen's and ours do not."""
    return tokenizer.encode("")[:1]
