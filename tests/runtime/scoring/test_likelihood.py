"""Likelihoods of continuations: shared contexts, packs and batches, against a row alone."""

import random

import pytest
import torch

from model.lm import LMConfig, MiniMindLM
from runtime.kernel_loader import apply_kernels
from runtime.scoring import likelihood
from runtime.scoring.likelihood import Continuation, score_continuations

SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, max_seq_len=48)
MOE = dict(use_moe=True, n_experts=4, n_experts_per_tok=2, n_shared_experts=1)


@torch.no_grad()
def alone(model, context, ids) -> tuple[float, bool]:
    logits = model(torch.tensor([[*context, *ids[:-1]]])).logits[0, len(context) - 1 :]
    logprobs = logits.double().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
    return float(logprobs.sum()), logits.argmax(-1).tolist() == list(ids)


def draw(rng: random.Random, size: int) -> list[int]:
    return [rng.randrange(101) for _ in range(size)]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("more", [{}, MOE], ids=["dense", "moe"])
def test_every_continuation_as_alone(more, kernels, monkeypatch):
    """Of one token or many, up to the end of the context, one behind a context or several."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**SHAPE, **more)).eval()
    plain = model.state_dict()
    if kernels:
        apply_kernels(model, torch.device("cpu"), "float32")
    reference = MiniMindLM(LMConfig(**SHAPE, **more)).eval()
    reference.load_state_dict(plain)
    rng = random.Random(0)
    requests = []
    for _ in range(25):
        context = draw(rng, rng.randint(1, 40))
        longest = rng.choice([1, 49 - len(context)])
        for _ in range(rng.choice([1, 1, 2, 4, 5])):
            requests.append(Continuation(context, draw(rng, rng.randint(1, longest))))
    requests += requests[:2]  # the same again
    with torch.no_grad():
        greedy = reference(torch.tensor([[5, 6]])).logits[0, -1].argmax().item()
    requests += [Continuation([5, 6], [greedy]), Continuation([5, 6], [(greedy + 1) % 101])]
    rng.shuffle(requests)
    expected = [alone(reference, *request) for request in requests]
    assert any(best for _, best in expected)
    for most in (4096, 90, 1):
        monkeypatch.setattr(likelihood, "MAX_TOKENS", most)
        counted = []
        scores = score_continuations(model, requests, counted.append)
        assert sum(counted) == len(requests) and (most > 90 or len(counted) > 9)
        for score, (logprob, best) in zip(scores, expected, strict=True):
            assert score.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
            assert score.is_greedy == best


def test_nothing_to_score():
    assert score_continuations(MiniMindLM(LMConfig(**SHAPE)), []) == []
