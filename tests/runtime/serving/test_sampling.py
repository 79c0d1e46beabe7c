"""Sampling for many requests at once: each row by its own parameters and random numbers."""

import math

import numpy as np
import pytest
import torch

from model.sampling import make_sampler
from runtime.serving.sampling import Sampling, TokenSource, next_tokens

CPU, VOCAB = torch.device("cpu"), 12


def source(prompt=(), **options) -> TokenSource:
    return TokenSource(Sampling(**options), list(prompt), VOCAB, CPU)


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draws(count: int, **options) -> np.ndarray:
    """How often each token is drawn from the same logits."""
    drawn, row = source(seed=5, **options), logits()
    tokens = [next_tokens(row[None], [drawn], [None])[0].id for _ in range(count)]
    return np.bincount(tokens, minlength=VOCAB) / count


def reference(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution, token by token."""
    probs = (logits() / temperature).softmax(-1).double().numpy()
    order = np.argsort(-probs)
    kept = order[: top_k or VOCAB]
    probs = np.where(np.isin(np.arange(VOCAB), kept), probs, 0.0)
    probs /= probs.sum()
    total, nucleus = 0.0, []
    for token in order:
        if total >= top_p:
            break
        nucleus.append(token)
        total += probs[token]
    probs = np.where(np.isin(np.arange(VOCAB), nucleus), probs, 0.0)
    probs = np.where(probs >= min_p * probs.max(), probs, 0.0)
    return probs / probs.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 4},
        {"top_p": 0.7},
        {"top_k": 5, "top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
        {"top_k": 1000},
        {"top_k": 1},
        {"top_p": 1e-9},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution(options):
    shares, wanted = draws(2000, **options), reference(**options)
    assert (shares[wanted == 0] == 0).all()
    assert np.abs(shares - wanted).max() < 4 * math.sqrt(0.25 / 2000)


def test_a_row_does_not_depend_on_its_neighbours():
    options = [
        {"seed": 3},
        {"temperature": 0.0},
        {"seed": 3, "top_p": 0.5},
        {"seed": 4, "min_p": 0.1, "temperature": 0.3},
        {"seed": 3, "top_k": 3, "repetition_penalty": 1.3, "logit_bias": {2: 1.5}},
        {"seed": -3, "frequency_penalty": 0.5},
    ]

    def run(rows: list[int]) -> dict[int, list[int]]:
        sources = [source([1, 2], **options[row]) for row in rows]
        said = {row: [] for row in rows}
        for step in range(20):
            batch = torch.stack([logits(10 * row + step) for row in rows])
            tokens = next_tokens(batch, sources, [None] * len(rows))
            for row, token in zip(rows, tokens, strict=True):
                said[row].append(token.id)
        return said

    together = run(list(range(6)))
    for row in range(6):
        assert run([row])[row] == together[row]
    assert run([5, 0, 3]) == {row: together[row] for row in (5, 0, 3)}


def test_a_request_without_a_seed_has_numbers_of_its_own():
    first, second = source(), source()
    flat = torch.zeros(1, VOCAB)
    runs = [[next_tokens(flat, [s], [None])[0].id for _ in range(30)] for s in (first, second)]
    assert runs[0] != runs[1]


def test_penalties_and_bias():
    row, prompt = logits(), [0, 3]
    penalised = source(prompt, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.4)
    for token in (3, 5, 5):
        penalised.add(token)
    wanted = row.clone()
    for token in (0, 3, 5):
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    wanted[3] -= 0.7 + 0.4
    wanted[5] -= 0.7 + 2 * 0.4
    torch.testing.assert_close(penalised.adjust(row), wanted)
    biased = source(logit_bias={4: -100.0, 2: 3.0}).adjust(row)
    torch.testing.assert_close(biased - row, torch.tensor([0, 0, 3.0, 0, -100] + [0] * 7))


def test_the_repetition_penalty_is_that_of_the_terminal():
    prompt, steps = [0, 3, 7], [logits(seed) / 4 + 2 for seed in range(15)]
    sampler = make_sampler([prompt], VOCAB, CPU, repetition_penalty=1.8)
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = [int(sampler(row[None], zero, zero)) for row in steps]
    penalised = source(prompt, temperature=0.0, repetition_penalty=1.8)
    got = [next_tokens(row[None], [penalised], [None])[0].id for row in steps]
    assert got == wanted and got != [int(row.argmax()) for row in steps]


def test_log_probabilities_are_the_models_own():
    """Whatever sampling does to the logits."""
    row = logits()
    exact = row.log_softmax(-1)
    banned = int(row.argmax())
    asked = source(temperature=0.0, top_logprobs=3, logit_bias={banned: -100.0})
    other = source(temperature=0.0)
    none = source(temperature=0.0, top_logprobs=0)
    first, second, third = next_tokens(row.expand(3, -1), [asked, other, none], [None] * 3)
    assert second == (banned, None, ()) and third.id == banned and third.top == ()
    assert third.logprob == pytest.approx(float(exact.max()))
    order = exact.argsort(descending=True).tolist()
    assert first.id == order[1] and first.logprob == pytest.approx(float(exact[order[1]]))
    assert [token for token, _ in first.top] == order[:3]
    assert [value for _, value in first.top] == pytest.approx(exact[order[:3]].tolist())


def test_seeds_of_either_sign_are_different_ones():
    flat = torch.zeros(1, VOCAB)
    runs = []
    for seed in (5, -5, 2**64 - 5):
        drawn = source(seed=seed)
        runs.append([next_tokens(flat, [drawn], [None])[0].id for _ in range(30)])
    assert runs[0] != runs[1] == runs[2]


class Only:
    """Allows some tokens."""

    error = ""

    def __init__(self, *tokens: int):
        self.mask = torch.zeros(VOCAB, dtype=torch.bool)
        self.mask[list(tokens)] = True

    def allowed(self) -> torch.Tensor:
        return self.mask


def test_a_constraint_counts_above_all():
    sources = [source(seed=1), source(temperature=0.0, logit_bias={2: 100.0}), source(seed=1)]
    constraints = [Only(4), Only(5, 6), None]
    for seed in range(20):
        tokens = next_tokens(logits(seed).expand(3, -1), sources, constraints)
        assert tokens[0].id == 4 and tokens[1].id in (5, 6)
