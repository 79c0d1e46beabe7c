"""The next tokens of many requests at once, each with sampling parameters of its own."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from model.sampling import sample


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: among the k most probable tokens; 0: all.
        top_p: among the smallest set of tokens of this probability.
        min_p: among tokens at least so probable, as a share of the most probable one's.
        repetition_penalty: > 1 lowers the logits of tokens in the prompt and the reply.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the reply, once
            or as often as they occurred.
        logit_bias: token -> what is added to its logit.
        seed: of the request's own random numbers; None: a new one.
        top_logprobs: None: log-probabilities are not asked for; else that of the token and of so
            many of the likeliest. They are the model's, before any of the above.
    Source: top-p is Holtzman et al. (2020), eq. 3; min-p Nguyen et al. (2024), section 4; the
    repetition penalty Keskar et al., CTRL (2019), section 4.1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return any(penalties)


class Constraint(Protocol):
    """Which tokens a reply may go on with.

    Attributes:
        error: why it can say no more; the reply ends with it. "": it can.
    """

    error: str

    def allowed(self) -> Tensor:
        """(vocab,) bool, on the CPU; end tokens included where the reply may end."""
        ...

    def advance(self, token: int) -> None:
        """Take up the token that the reply went on with."""
        ...


class NewToken(NamedTuple):
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability) of the likeliest


class TokenSource:
    """Where a request's tokens come from: its parameters, random numbers and what it has said."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab_size: int, device):
        self.sampling = sampling
        seed = int.from_bytes(os.urandom(8), "big") if sampling.seed is None else sampling.seed
        self.random = np.random.default_rng(seed % 2**64).random
        self.seen = self.counts = None
        if sampling.has_penalties:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[prompt] = True
            self.counts = torch.zeros(vocab_size, device=device)
        self.bias = None
        if sampling.logit_bias:
            tokens, values = zip(*sampling.logit_bias.items(), strict=True)
            self.bias = torch.tensor(tokens, device=device), torch.tensor(values, device=device)

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits (vocab,) with penalties and bias."""
        sampling = self.sampling
        if self.seen is not None:
            factor = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self.seen, penalised, logits)
            logits = logits - sampling.frequency_penalty * self.counts
            logits = logits - sampling.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            logits = logits.index_add(0, *self.bias)
        return logits

    def add(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = True
            self.counts[token] += 1


def next_tokens(
    logits: Tensor, sources: list[TokenSource], constraints: list[Constraint | None]
) -> list[NewToken]:
    """Draw a token for each row of logits (R, vocab) float32.

    A row's token depends on its own logits, parameters and random numbers alone.
    """
    chosen = logits
    for row, (source, constraint) in enumerate(zip(sources, constraints, strict=True)):
        changed = source.seen is not None or source.bias is not None
        if not changed and constraint is None:
            continue
        chosen = logits.clone() if chosen is logits else chosen
        if changed:
            chosen[row] = source.adjust(chosen[row])
        if constraint is not None:
            chosen[row].masked_fill_(~constraint.allowed().to(chosen.device), -math.inf)
    tokens = sample(chosen, 0.0).tolist()
    random_rows = [row for row, source in enumerate(sources) if source.sampling.temperature > 0]
    if random_rows:
        rows = slice(None) if len(random_rows) == len(sources) else random_rows
        drawn = draw(chosen[rows], [sources[row] for row in random_rows])
        for row, token in zip(random_rows, drawn, strict=True):
            tokens[row] = token
    for source, token in zip(sources, tokens, strict=True):
        source.add(token)
    return with_logprobs(logits, tokens, sources)


def draw(logits: Tensor, sources: list[TokenSource]) -> list[int]:
    """Draw a token for each row of logits (R, vocab), by inversion of the cumulated probability.

    Source: Devroye, Non-Uniform Random Variate Generation (1986), section III.2.
    """
    each = [source.sampling for source in sources]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(1)

    probs = (logits / column([s.temperature for s in each])).softmax(dim=-1)
    if any(s.top_k or s.top_p < 1 for s in each):
        vocab = logits.size(1)
        top_k = column([min(s.top_k or vocab, vocab) for s in each])
        probs = keep_likeliest(probs, top_k, column([s.top_p for s in each]))
    if any(s.min_p for s in each):
        least = probs.amax(dim=-1, keepdim=True) * column([s.min_p for s in each])
        probs = probs.masked_fill(probs < least, 0.0)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulated = probs.cumsum(dim=-1, dtype=exact)
    uniform = column([source.random() for source in sources]).to(exact)
    token = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    # Rounding must not choose a token of probability 0 behind the last possible one.
    last = logits.size(1) - 1 - (probs.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(token, last).tolist()


def keep_likeliest(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what top-k and then top-p leave out of probs (R, vocab); top_k, top_p: (R, 1)."""
    values, order = probs.sort(dim=-1, descending=True)
    ranks = torch.arange(values.size(1), device=probs.device)
    values = values.masked_fill(ranks >= top_k, 0.0)
    before = values.cumsum(dim=-1) - values
    beyond = before >= top_p * values.sum(dim=-1, keepdim=True)
    beyond[:, 0] = False
    values = values.masked_fill(beyond & (top_p < 1), 0.0)
    return torch.zeros_like(probs).scatter(1, order, values)


def with_logprobs(logits: Tensor, tokens: list[int], sources: list[TokenSource]) -> list[NewToken]:
    """The tokens, with the log-probabilities that were asked for."""
    news = [NewToken(token) for token in tokens]
    rows = [n for n, source in enumerate(sources) if source.sampling.top_logprobs is not None]
    if not rows:
        return news
    log_probs = logits[rows].log_softmax(dim=-1)
    most = max(sources[row].sampling.top_logprobs for row in rows)
    values, ids = log_probs.topk(min(most, log_probs.size(1)), dim=-1)
    for at, row in enumerate(rows):
        count = sources[row].sampling.top_logprobs
        top = tuple(zip(ids[at, :count].tolist(), values[at, :count].tolist(), strict=True))
        news[row] = NewToken(tokens[row], float(log_probs[at, tokens[row]]), top)
    return news
