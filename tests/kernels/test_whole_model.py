"""The tests of the plain model, run on a model with kernels."""

import pytest
import test_families
import test_generation
import test_model
import torch
from test_model import KINDS, build, ids

import kernels
from kernels import compiling

for module in (test_model, test_generation, test_families):
    globals().update(
        {name: test for name, test in vars(module).items() if name.startswith("test_")}
    )


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    def change(model) -> None:
        kernels.apply(model, torch.device("cpu"), torch.float32)

    monkeypatch.setattr(test_model, "prepare", [change])


@pytest.mark.parametrize("kind, backend", [("dense", "inductor"), ("moe", "aot_eager")])
def test_compiled_equals_eager_and_is_not_compiled_again_for_new_lengths(kind, backend):
    """The slowest test here: code is generated and compiled for the dense model."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = build(n_layers=1, **KINDS[kind]).train()
    twin = build(n_layers=1, **KINDS[kind]).train()
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend(backend)
    for block in model.model.layers:
        block.compile(dynamic=True, backend=counter)

    def both(lens):
        x, at = ids(1, sum(lens)), torch.arange(0, sum(lens), 2)
        for each in (model, twin):
            out = each(x, doc_lens=lens, logits_at=at)
            (out.logits.square().mean() + out.aux_loss).backward()
            yield out.logits.detach()

    random = torch.get_rng_state()
    compiling.compile_now(model, torch.device("cpu"), "float32", documents=6, longest=16)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(
        torch.get_rng_state(), random
    )
    graphs = counter.frame_count
    assert graphs > 0
    for lens in ([5, 9], [7, 8, 20], [30, 1], [50, 2, 9, 1], [40, 40], [11] * 5, [3, 90], [6, 8]):
        compiled, eager = both(lens)
        assert (compiled - eager).abs().max() <= 1e-5
    assert counter.frame_count == graphs
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name
    torch._dynamo.reset()
