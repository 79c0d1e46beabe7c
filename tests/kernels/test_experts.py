"""The products of a mixture of experts against their definitions: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from kernels.experts import RouterFunction, grouped_linear
from kernels.native import functions_for


@pytest.mark.parametrize(
    "tokens, few, dim", [(0, 4, 32), (1, 1, 8), (7, 3, 40), (300, 4, 512), (33, 9, 100)]
)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=str)
def test_a_product_of_few_rows_is_summed_in_float32(tokens, few, dim, dtype, most):
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (
        torch.randn(*n, generator=generator) for n in ((tokens, dim), (few, dim), (tokens, few))
    )
    x = x.to(dtype)
    ours, exact = (
        [t.to(d or t.dtype, copy=True).requires_grad_() for t in (x, weight)]
        for d in (None, torch.float64)
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = RouterFunction.apply(*ours, functions_for(x))
    y.backward(upstream)
    expected = F.linear(*exact)
    expected.backward(upstream.double())
    assert y.dtype == torch.float32 and (y - expected).norm() <= 1e-6 * expected.norm()
    assert (ours[1].grad - exact[1].grad).norm() <= 1e-6 * exact[1].grad.norm()
    assert (
        ours[0].grad.dtype == dtype
        and (ours[0].grad - exact[0].grad).norm() <= most * exact[0].grad.norm()
    )


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("sizes", [(4, 0, 16), (0, 600, 1200)], ids=str)
@pytest.mark.parametrize("shape", [(16, 24), (64, 96)], ids=str)
def test_grouped_products_are_those_of_each_group(dtype, most, sizes, shape):
    """A group without rows has the gradient 0."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(sum(sizes), shape[1], generator=generator),
        torch.randn(3, *shape, generator=generator),
    )
    ends = torch.tensor(sizes).cumsum(0).int()
    x = x.to(dtype).float()  # the weight is rounded by what is tested
    ours, exact = (
        [t.to(d, copy=True).requires_grad_() for t in (x, weight)]
        for d in (torch.float32, torch.float64)
    )
    halves = grouped_linear(ours[0].to(dtype), ours[1], ends, parts=2)
    y = torch.cat(halves, dim=1)
    expected = torch.cat(
        [part @ w.T for part, w in zip(exact[0].split(sizes), exact[1], strict=True)]
    )
    y.sum().backward()  # a gradient without strides of its own
    expected.sum().backward()
    pairs = [(y.detach(), expected.detach())] + [
        (a.grad, b.grad) for a, b in zip(ours, exact, strict=True)
    ]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() <= most * theirs.norm()
        torch.testing.assert_close(
            mine.double(), theirs, rtol=most, atol=most * float(theirs.abs().max())
        )
    assert ours[1].grad.is_contiguous() and ours[1].grad.dtype == torch.float32
    assert not ours[1].grad[sizes.index(0)].any()
