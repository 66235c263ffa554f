"""The reference in float64 against torch's convolution, the equation and differences, and in lower precisions."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations, product

import pytest
import torch
from torch import Tensor

from tests.kernels.local_dwconv.calls import EVERYTHING, LAYOUTS, Call, composed, fused, laid_out, make, results, summed
from tests.tolerance import EXACT, no_worse_than

reference = fused("reference")
SIZES = (3, 5, 7)


def check(call: Call, grad: Tensor | None = None) -> None:
    found = results(reference, call, grad)
    assert found["y"].is_contiguous() and all(found[name].is_contiguous() for name in ["d x"] if name in found)
    torch.testing.assert_close(found, results(summed, call, grad), **EXACT)
    torch.testing.assert_close(found, results(composed, call, grad), **EXACT)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [*product(SIZES, SIZES)], ids=str)
def test_every_kernel_size_and_dilation(kernel, dilation):
    check(make(kernel=kernel, dilation=dilation))


@pytest.mark.parametrize("prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("grid", [(37, 37), (16, 16), (7, 7), (5, 9), (1, 1), (1, 6), (6, 1)], ids=str)
def test_every_grid_and_prefix(grid, prefix_tokens):
    check(make(grid=grid, prefix_tokens=prefix_tokens, channels=3))


@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_any_number_of_samples(batch):
    check(make(batch, grid=(3, 4)))


@pytest.mark.parametrize("dilation", [4, 5, 6, 100, 2**40])
def test_taps_that_reach_past_the_grid(dilation):
    check(make(grid=(4, 6), dilation=dilation))


def test_without_a_bias():
    check(make(bias=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    call = replace(make(3), x=laid_out(layout, 46, 6, torch.float64)).requiring(*EVERYTHING)
    check(call)
    check(call, laid_out(layout, 46, 6, torch.float64))


def test_any_layout_of_the_weight():
    call = make()
    for order in ((0, 2, 1), (1, 2, 0), (2, 1, 0)):
        inverse = [order.index(i) for i in range(3)]
        weight = call.weight.detach().permute(order).contiguous().permute(inverse)
        assert not weight.is_contiguous()
        check(replace(call, weight=weight).requiring(*EVERYTHING))


SUBSETS = list(chain.from_iterable(combinations(EVERYTHING, n) for n in range(1, 4)))


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(needs):
    check(make(needs=needs))


def test_prefix_tokens_and_their_gradients_pass_as_they_are():
    call = make(prefix_tokens=5)
    grad = torch.randn_like(call.x)
    found = results(reference, call, grad)
    assert torch.equal(found["y"][:, :5], call.x[:, :5]) and torch.equal(found["d x"][:, :5], grad[:, :5])


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_derivatives_of_first_and_second_order(needs):
    call = make(1, (2, 3), 2, prefix_tokens=2, dilation=2, kernel=(3, 5), needs=needs)

    def function(*tensors: Tensor) -> Tensor:
        return reference(call.with_tensors(*tensors))

    assert torch.autograd.gradcheck(function, list(call.tensors.values()))
    assert torch.autograd.gradgradcheck(function, list(call.tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (7, 5)], ids=str)
def test_lower_precisions_round_no_more_than_eager(kernel, dtype):
    call = make(3, (9, 7), 24, kernel, dtype=dtype)
    no_worse_than(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))
