"""Log-probabilities of texts behind texts: what choices, bits per byte and lm-eval are made of."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOKENS = 4096  # of one pass, unless a single document is longer
MAX_LOGITS = 2**27  # of one pass: 512 MiB in float32


class Continuation(NamedTuple):
    """Token ids, and those before them, of which there is at least one."""

    context: Sequence[int]
    ids: Sequence[int]


class Likelihood(NamedTuple):
    """Of a continuation: natural log of its probability, and whether greedy search writes it."""

    logprob: float
    is_greedy: bool


@torch.no_grad()
def score_continuations(
    model, continuations: Sequence[Continuation], advance: Callable[[int], object] | None = None
) -> list[Likelihood]:
    """The likelihood of each continuation behind its context.

    Documents are packed without padding, the longest first. Continuations that differ in their last
    token alone, such as the letters of a question's choices, are read once.

    Args:
        model: a MiniMindLM; a context with its continuation fits max_seq_len + 1 tokens.
        advance: called with how many continuations were scored since.
    """
    documents: dict[tuple[int, ...], list[int]] = {}
    for number, (context, ids) in enumerate(continuations):
        assert len(context) and len(ids), "a context and a continuation have a token at least"
        documents.setdefault((*context, *ids[:-1]), []).append(number)
    likelihoods: list[Likelihood] = [Likelihood(0.0, True)] * len(continuations)
    for pack in pack_documents(documents, continuations, model.config.vocab_size):
        numbers = [number for document in pack for number in documents[document]]
        for number, likelihood in zip(
            numbers, score_pack(model, pack, documents, continuations), strict=True
        ):
            likelihoods[number] = likelihood
        if advance:
            advance(len(numbers))
    return likelihoods


def pack_documents(
    documents: dict[tuple[int, ...], list[int]],
    continuations: Sequence[Continuation],
    vocab_size: int,
) -> Iterator[list[tuple[int, ...]]]:
    """The documents of each pass, the longest first: memory that does not suffice shows at once."""
    pack, tokens, logits = [], 0, 0
    for document in sorted(documents, key=lambda ids: -len(ids)):
        longest = max(len(continuations[number].ids) for number in documents[document])
        tokens += len(document)
        logits += longest * vocab_size
        if pack and (tokens > MAX_TOKENS or logits > MAX_LOGITS):
            yield pack
            pack, tokens, logits = [], len(document), longest * vocab_size
        pack.append(document)
    if pack:
        yield pack


def score_pack(
    model,
    pack: list[tuple[int, ...]],
    documents: dict[tuple[int, ...], list[int]],
    continuations: Sequence[Continuation],
) -> list[Likelihood]:
    """The likelihoods of the continuations of a pack's documents, in their order, in one pass."""
    positions, rows, targets, sizes = [], [], [], []
    end = 0  # of a document in the row
    for document in pack:
        end += len(document)
        ids_of = [continuations[number].ids for number in documents[document]]
        longest = max(map(len, ids_of))
        positions += range(end - longest, end)
        for ids in ids_of:
            rows += range(len(positions) - len(ids), len(positions))
            targets += ids
            sizes.append(len(ids))
    device = model.lm_head.weight.device
    tokens = torch.tensor([[token for document in pack for token in document]], device=device)
    at = torch.tensor(positions, device=device)
    logits = model(tokens, doc_lens=list(map(len, pack)), logits_at=at).logits.float()
    logprobs, is_likeliest = token_logprobs(
        logits, torch.tensor(rows, device=device), torch.tensor(targets, device=device)
    )
    parts = zip(logprobs.split(sizes), is_likeliest.split(sizes), strict=True)
    return [Likelihood(float(part.sum()), bool(best.all())) for part, best in parts]


def token_logprobs(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, and whether each is the likeliest, on the host.

    Args:
        logits: (K, vocab) float32.
        rows: (N,) int64, of `logits`. targets: (N,) int64, the tokens.

    Returns:
        (N,) float64 and (N,) bool.
    """
    normaliser = logits.logsumexp(dim=-1)  # (K,)
    best = logits.max(dim=-1).indices
    logprobs = logits[rows, targets] - normaliser[rows]
    return logprobs.cpu().double(), (best[rows] == targets).cpu()


def text_begin(tokenizer) -> list[int]:
    """The token that a tokenizer puts before a text: Llama's does, Qwen's and ours do not."""
    return tokenizer.encode("")[:1]
