"""Each kernel against its definition: values, gradients, and what it never allocates."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from test_model import build, ids
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import attention, cross_entropy, linear, native, norm, pointwise
from kernels.lora import FastLoRALinear
from model import recompute
from model.layout import Layout
from model.lora import LoRALinear

DIM, VOCAB = 32, 700


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 8 * VOCAB)
    monkeypatch.setattr(cross_entropy, "LEAST_TOKENS", 4)
    # Of a chunk's 8 rows; gradients of weights come in two pieces.
    for module in (
        linear,
        cross_entropy,
    ):
        monkeypatch.setattr(module, "CACHED", 3 * VOCAB)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, DIM, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, generator=generator) * 0.3).requires_grad_()
    return x, weight, torch.randint(VOCAB, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [1, 8, 29])
def test_loss_and_gradients_are_those_of_cross_entropy(tokens):
    x, weight, targets = inputs(tokens)
    (3 * cross_entropy.linear_cross_entropy(x, weight, targets)).backward()
    gradients = [x.grad, weight.grad]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    (3 * expected).backward()
    assert cross_entropy.linear_cross_entropy(x, weight, targets).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    for ours, theirs in zip(gradients, (exact[0].grad, exact[1].grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_weight_is_summed_in_float32():
    x, weight, targets = inputs(64, torch.bfloat16)
    cross_entropy.linear_cross_entropy(x, weight, targets).backward()
    exact = weight.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(x.detach().float(), exact), targets, reduction="sum").backward()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert (weight.grad - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_without_a_token_there_are_gradients_of_zero():
    x, weight, targets = inputs(0)
    loss = cross_entropy.linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, DIM) and not weight.grad.any()


def test_what_is_frozen_or_not_differentiated_costs_nothing():
    x, weight, targets = inputs(29)
    cross_entropy.linear_cross_entropy(x, weight.detach(), targets).backward()
    expected = x.grad
    x.grad = None
    cross_entropy.linear_cross_entropy(x, weight, targets).backward()
    assert torch.equal(x.grad, expected)
    with torch.no_grad():
        assert cross_entropy.linear_cross_entropy(x, weight, targets).grad_fn is None


def test_logits_exist_for_a_chunk_of_tokens_only():
    x, weight, targets = inputs(64)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in torch.utils._pytree.tree_leaves(out)
                if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        cross_entropy.linear_cross_entropy(x, weight, targets).backward()
    assert max(sizes) == weight.numel() < 64 * VOCAB and 8 * VOCAB in sizes


def gains(weight: torch.Tensor) -> Namespace:
    """Stands in for an RMSNorm whose weight is no parameter."""
    return Namespace(weight=weight, eps=1e-6)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm.add_rms_norm(x, None, gains(weight))[1]


@pytest.mark.parametrize("shape", [(1, 50, 48), (2, 7, 3, 16)], ids=str)
def test_rms_norm_and_its_gradients_are_those_of_the_definition(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)
    x[..., 0, :] = 0  # a row without a direction
    upstream = torch.randn(shape, generator=generator)
    ours, exact = (
        [t.to(kind, copy=True).requires_grad_() for t in (x, weight)]
        for kind in (torch.float32, torch.float64)
    )
    y = rms_norm(*ours)
    expected = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact[1]
    (y * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(*ours), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [6, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rotation_is_that_of_complex_numbers_and_its_gradient_the_inverse(dtype, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, size, generator=generator).to(dtype).requires_grad_()
    angle = torch.rand(2, 9, 1, size // 2, generator=generator) * 6
    y = pointwise.apply_rope(x, angle.cos(), angle.sin())
    a, b = x.detach().float().chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    accuracy = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 0.05}
    torch.testing.assert_close(
        y.detach().float(), torch.cat((turned.real, turned.imag), dim=-1), **accuracy
    )
    y.backward(y.detach())
    torch.testing.assert_close(x.grad, x.detach(), **accuracy)


KINDS = [(torch.float32, 1e-6), (torch.bfloat16, 0.005)]
LENS = torch.tensor([70, 5, 0, 32, 1, 40])  # one, two and three blocks of queries


def layout_of(lens: torch.Tensor) -> Layout:
    cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).int()
    return Layout(None, None, doc_lens=lens, cu_seqlens=cu_seqlens, max_seqlen=int(lens.max()))


def attended(q, k, v, upstream, lens=LENS):
    """Attention to documents and its gradients."""
    tensors = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention.document_attention(*tensors, layout_of(lens))
    out.backward(upstream)
    return [out.detach(), *(t.grad for t in tensors)]


def heads_of(dtype, size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, int(LENS.sum()), heads, size) for heads in (6, 2, 2, 6)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("dtype, most", KINDS, ids=str)
@pytest.mark.parametrize("size", [6, 32, 64, 80], ids=str)
def test_attention_and_its_gradients_are_near_those_in_float64(dtype, most, size):
    inputs = heads_of(dtype, size)
    for ours, exact in zip(attended(*inputs), attended(*(t.double() for t in inputs)), strict=True):
        assert ours.dtype == dtype and (ours.double() - exact).norm() < most * exact.norm()


@pytest.mark.parametrize("dtype, most", KINDS, ids=str)
def test_attention_to_a_document_does_not_depend_on_its_neighbours(dtype, most):
    inputs = heads_of(dtype, 16)
    for together, alone in zip(
        attended(*inputs), attended(*(t[:, :, :70] for t in inputs), LENS[:1]), strict=True
    ):
        assert torch.equal(together[:, :, :70], alone)


@pytest.mark.parametrize("size", [16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_in_bfloat16_is_that_of_the_definition(dtype, size):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(2, 5, size, generator=generator).to(dtype),
        torch.randn(size, generator=generator),
    )
    x[0, 0] = 0
    upstream = torch.randn(2, 5, size, generator=generator).bfloat16()
    ours, exact = ([t.to(d, copy=True).requires_grad_() for t, d in zip((x, weight), kinds, strict=True)]
                   for kinds in ((dtype, torch.float32), (torch.float64,) * 2))  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(*ours)
    expected = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact[1]
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == torch.bfloat16 and ours[0].grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(ours[1].grad.double(), exact[1].grad, rtol=1e-4, atol=1e-4)
    accuracy = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    )
    torch.testing.assert_close(ours[0].grad[0, 1:].double(), exact[0].grad[0, 1:], **accuracy)
    low = weight.bfloat16().requires_grad_()  # as FSDP2 and DeepSpeed hand them over
    with torch.autocast("cpu", torch.bfloat16):
        rms_norm(x, low).backward(upstream)
    assert (
        low.grad.dtype == torch.bfloat16
        and (low.grad - exact[1].grad).norm() < 0.02 * exact[1].grad.norm()
    )


@pytest.mark.parametrize("low", [False, True], ids=["products in float32", "in bfloat16"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("branch", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_branch_and_the_norm_meet_in_one_stream(stream, branch, low):
    """Values and gradients, both results in use and the norm alone, of a strided stream."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 7, 40, generator=generator)
    inputs = [
        rows[0].T.to(stream).T,
        *([] if branch is None else [rows[1].to(branch)]),
        torch.linspace(-2, 2, 40),
    ]
    for by_total, by_norm in ((rows[2], rows[3]), (torch.zeros(7, 40), rows[3])):
        ours = [t.clone().requires_grad_() for t in inputs]
        exact = [t.double().requires_grad_() for t in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            total, normed = norm.add_rms_norm(ours[0], ours[1] if branch else None, gains(ours[-1]))
        assert normed.dtype == (torch.bfloat16 if low else stream)
        loss = (normed.float() * by_norm).sum()
        (loss + (total * by_total).sum() if by_total.any() else loss).backward()
        expected = sum(exact[:-1])
        mean = expected.square().mean(-1, keepdim=True)
        (
            (expected * by_total).sum()
            + (expected * (mean + 1e-6).rsqrt() * exact[-1] * by_norm).sum()
        ).backward()
        most = (
            1e-6
            if {stream, total.dtype, normed.dtype, branch or stream} == {torch.float32}
            else 2**-7
        )
        for mine, theirs in [
            (total, expected),
            *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)),
        ]:
            assert (mine - theirs).norm() <= most * theirs.norm()
        assert all(t.grad.dtype == t.dtype for t in ours)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str)
def test_swiglu_and_its_gradients_are_those_of_the_definition(dtype, most):
    """Also where an exponential vanishes or would overflow, and a number that is none stays one."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.cat(
        [torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-30])]
    ).to(dtype)
    up, upstream = (torch.randn(len(gate), generator=generator).to(dtype) for _ in range(2))
    ours, exact = (
        [t.to(d, copy=True).requires_grad_() for t in (gate, up)] for d in (dtype, torch.float64)
    )
    y, expected = pointwise.swiglu(*ours), F.silu(exact[0]) * exact[1]
    y.backward(upstream)
    expected.backward(upstream.double())
    for mine, theirs in [
        (y, expected),
        *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)),
    ]:
        torch.testing.assert_close(mine, theirs.to(dtype), rtol=10 * most, atol=1e-6)
    assert pointwise.swiglu(torch.full((3,), torch.nan, dtype=dtype), up[:3]).isnan().all()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str)
@pytest.mark.parametrize("vocab", [5, 64, 77])
def test_the_gradient_of_logits_is_probability_minus_one_hot(dtype, most, vocab):
    generator = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(9, vocab, generator=generator) * 20,
        torch.randint(0, vocab, (9,), generator=generator),
    )
    logits = logits.to(dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    loss = cross_entropy.cross_entropy(logits, targets)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=10 * most, atol=most)
    logits[3, 2] = torch.nan
    assert cross_entropy.cross_entropy(logits, targets).isnan()


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_without_a_compiler_torch_computes_the_same(dtype, most, monkeypatch):
    lens, model = [20, 9, 3], build().train()
    kernels.apply(model, torch.device("cpu"), dtype)
    tokens = ids(1, sum(lens))

    def results():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            targets = tokens[0].roll(-1)
            loss = model(
                tokens, doc_lens=lens, logits_at=torch.arange(len(targets)), targets=targets
            ).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    ours = results()
    monkeypatch.setattr(native, "library", lambda *_, **__: None)
    for mine, theirs in zip(ours, results(), strict=True):
        assert (mine - theirs).norm() <= most * theirs.norm()


@pytest.mark.parametrize("tokens", [1, 33, 600])
@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (1120, 1056), (40, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_is_the_product_of_rounded_factors(tokens, shape, dtype):
    """Sizes at the edges of what is multiplied at once, and such as linear.cpp does not take."""
    generator = torch.Generator().manual_seed(0)
    layer = linear.FastLinear(shape[1], shape[0], bias=False, dtype=dtype)
    x, upstream = (
        torch.randn(2, tokens, n, generator=generator).bfloat16() for n in reversed(shape)
    )
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer(x).sum().backward()  # a gradient without strides of its own
    x.grad = layer.weight.grad = None
    y.backward(upstream)
    rows, weight, grad = (
        t.detach().bfloat16().flatten(0, -2).double() for t in (x, layer.weight, upstream)
    )
    exact = rows @ weight.T, grad @ weight, grad.T @ rows
    for ours, theirs in zip((y, x.grad, layer.weight.grad), exact, strict=True):
        assert (ours.flatten(0, -2).double() - theirs).norm() <= 2**-8 * theirs.norm()
    if linear.products(torch.bfloat16) and dtype == torch.float32:
        assert (layer.weight.grad.double() - exact[2]).norm() <= 1e-6 * exact[
            2
        ].norm()  # not rounded
    layer.weight.requires_grad_(False)
    before, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).backward(upstream)
    assert torch.equal(x.grad, before)
    layer.bias = torch.nn.Parameter(torch.randn(shape[0], generator=generator).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(upstream)
    exact = rows @ weight.T + layer.bias.detach().double(), grad.sum(0)
    for ours, theirs in zip((y.flatten(0, -2), layer.bias.grad), exact, strict=True):
        assert (ours.double() - theirs).norm() <= 2**-7 * theirs.norm()


@torch.no_grad()
def test_a_step_of_generation_adds_the_bias():
    layer, x = linear.FastLinear(32, 48), torch.randn(16, 1, 32)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape, rank", [((96, 64), 8), ((1120, 1056), 40), ((40, 48), 4)])
def test_a_lora_layer_and_its_gradients_are_those_of_the_formula(shape, rank, bias):
    """Ranks that linear.cpp multiplies after filling them up, and sizes that it does not take."""
    base = torch.nn.Linear(shape[1], shape[0], bias).requires_grad_(False)
    layer = LoRALinear(base, rank, 16.0, 0.0)
    torch.nn.init.normal_(layer.lora_B)
    x, upstream = (torch.randn(3, 25, n).bfloat16() for n in reversed(shape))

    def results(kind: type, low: bool) -> list[torch.Tensor]:
        layer.__class__ = kind
        layer.zero_grad(set_to_none=True)
        rows = (x if low else x.float()).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = layer(rows)
        y.backward(upstream.to(y.dtype))
        assert layer.weight.grad is None and rows.grad.dtype == rows.dtype
        return [y.detach(), rows.grad, layer.lora_A.grad, layer.lora_B.grad]

    exact = results(LoRALinear, low=False)
    for ours, theirs in zip(results(FastLoRALinear, low=True), exact, strict=True):
        assert (ours.float() - theirs).norm() <= 0.01 * theirs.norm()
    for ours, theirs in zip(results(FastLoRALinear, low=False), exact, strict=True):
        assert torch.equal(ours, theirs)  # in float32 it is the plain layer


@pytest.mark.parametrize("lora", [False, True])
def test_selective_checkpointing_keeps_products(lora):
    linear.keep_products()
    layer = linear.FastLinear(64, 32, bias=False)
    if lora:
        layer = LoRALinear(layer, 8, 16.0, 0.0)
        layer.__class__ = FastLoRALinear

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counts[-1] += op in recompute.EXPENSIVE
            return op(*args, **(kwargs or {}))

    block = torch.nn.Sequential(layer, torch.nn.SiLU())
    x, counts = torch.randn(5, 64, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16):
        for level in (0, 1, 2):
            loss = recompute.recompute(level, block, x).sum()
            counts.append(0)
            with Count():
                loss.backward()
    made = 1 if not lora else 2 if linear.products(torch.bfloat16) else 3
    assert counts[0] == counts[2] == counts[1] - made


def test_rows_get_few_lengths_in_bfloat16_and_keep_theirs_elsewhere():
    weight = torch.nn.Parameter(torch.zeros(1))
    assert linear.length_step(5000, weight) == 1
    with torch.autocast("cpu", torch.bfloat16):
        lengths = {n: native.round_up(n, linear.length_step(n, weight)) for n in range(1, 9000)}
    assert all(n <= longer <= 1.035 * n for n, longer in lengths.items())
    assert len({longer for n, longer in lengths.items() if 4096 <= n < 8192}) <= 33
