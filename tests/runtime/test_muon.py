"""Muon takes the blocks' matrices, each expert's by itself, and leaves the router to AdamW."""

import pytest
import torch

from model.lm import LMConfig, MiniMindLM
from runtime import optim
from runtime.optimizers import muon

MOE = LMConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, use_moe=True, n_shared_experts=1
)


@pytest.mark.parametrize(
    "shape", [(3, 24, 8), (3, 8, 24), (1, 8, 8)], ids=["tall", "wide", "square"]
)
def test_stacked_experts_are_updated_as_matrices_of_their_own(shape, monkeypatch):
    monkeypatch.setattr(
        muon, "fast_dtype", lambda device: torch.float32
    )  # no rounding to hide behind
    scale = torch.tensor([1.0, 1e-3, 1e3])[
        : shape[0], None, None
    ]  # experts of very unequal traffic
    stacked = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [muon.OrthogonalMomentum([p], **options) for p in (stacked, *alone)]
    for _ in range(3):
        stacked.grad = scale * torch.randn(shape)
        for matrix, gradient in zip(alone, stacked.grad, strict=True):
            matrix.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = torch.stack([matrix.detach() for matrix in alone])
    torch.testing.assert_close(stacked.detach(), expected, rtol=1e-4, atol=1e-5)
    singular = torch.linalg.svdvals(muon.orthogonalise(stacked.grad))
    assert singular.min() > 0.5 and singular.max() < 1.3, (
        "each of them, whatever the size of its gradient"
    )


def test_matrices_of_one_shape_are_updated_together_as_if_alone(monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.float32)
    shapes = [(8, 24), (24, 8), (8, 24), (3, 8, 24), (16, 16), (8, 24), (3, 8, 24), (8, 24)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [muon.OrthogonalMomentum(together, **options)]
    optimizers += [muon.OrthogonalMomentum([p], **options) for p in alone]
    for missing in (None, 2, 5):  # a matrix without a gradient is left as it is
        for i, (p, same) in enumerate(zip(together, alone, strict=True)):
            p.grad = None if i == missing else torch.randn(p.shape)
            same.grad = p.grad
        for optimizer in optimizers:
            optimizer.step()
    for p, same in zip(together, alone, strict=True):
        torch.testing.assert_close(p.detach(), same.detach(), rtol=1e-4, atol=1e-5)


def test_at_most_so_many_numbers_are_updated_together():
    parameters = [torch.nn.Parameter(torch.zeros(4, 8)) for _ in range(5)]
    sizes = [len(same) for same in muon.of_one_shape(parameters, most=64)]
    assert sizes == [2, 2, 1]
    assert [len(same) for same in muon.of_one_shape(parameters, most=1)] == [1] * 5


def test_what_muon_takes():
    model = MiniMindLM(MOE)
    names = {p: name for name, p in model.named_parameters()}
    parts = optim.make_optimizer(model, "muon", 1e-3, 0.1).parts
    taken = {
        kind: {names[p] for group in part.param_groups for p in group["params"]}
        for kind, part in parts.items()
    }
    block = "model.layers.0."
    matrices = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    matrices += [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    matrices += [f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert {name for name in taken["muon"] if name.startswith(block)} == {
        block + name for name in matrices
    }
    assert taken["adamw"] == set(names.values()) - taken["muon"]
    assert (
        f"{block}mlp.gate.weight" in taken["adamw"]
        and "model.embed_tokens.weight" in taken["adamw"]
    )
