"""The reference against torch's own functions in float64: values, every gradient, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.local_conv_adapter.calls import ACTIVATIONS, Call, composed, fused, make, randn, results
from tests.tolerance import EXACT, no_worse_than

reference = fused("reference")


def check(call: Call) -> None:
    expected = results(composed, call)
    assert all(tensor.abs().max() > 0 for tensor in expected.values() if tensor.numel())
    torch.testing.assert_close(results(reference, call), expected, **EXACT)


@pytest.mark.parametrize("scale", [0.3, "shared", "rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_scale(activation, scale):
    check(make(activation=activation, scale=scale, residual=scale != "shared"))


@pytest.mark.parametrize("dilation", [1, 2, 2**40])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 7), (7, 5)], ids=str)
def test_every_kernel_size_and_dilation(kernel, dilation):
    check(make(grid=(5, 9), kernel=kernel, dilation=dilation))


@pytest.mark.parametrize("prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("grid", [(37, 37), (16, 16), (7, 7), (5, 9), (1, 1)], ids=str)
def test_every_grid_and_prefix(grid, prefix_tokens):
    check(make(grid=grid, prefix_tokens=prefix_tokens, h=3))


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_any_number_of_samples(batch):
    call = make(batch, scale="rows", residual=True)
    torch.testing.assert_close(results(reference, call), results(composed, call), **EXACT)


def test_strided_tensors_and_no_biases():
    call = make(biases=False, residual=True)
    for name, tensor in call.tensors.items():
        wide = randn(*tensor.shape[:-1], 2 * tensor.shape[-1]).double()[..., ::2]
        call.tensors[name] = wide if tensor.ndim == 3 else wide.t().contiguous().t()
    call.requiring(*call.tensors)
    check(call)


NEEDS = [("x",), ("down_weight",), ("down_bias",), ("weight",), ("conv_bias",), ("up_weight",), ("up_bias",), ("scale",),
         ("residual",), ("conv_bias", "residual"), ("down_bias", "up_bias")]  # fmt: skip


@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_some_gradients(needs):
    check(make(scale="rows", residual=True).requiring(*needs))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_derivatives_of_first_and_second_order(activation):
    call = make(1, (2, 2), 2, 2, 2, dilation=2, scale="rows", residual=True, activation=activation)

    def function(*tensors: Tensor) -> Tensor:
        return reference(call.with_tensors(tensors))

    assert torch.autograd.gradcheck(function, list(call.tensors.values()))
    assert torch.autograd.gradgradcheck(function, list(call.tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype):
    call = make(3, (5, 9), 48, 16, 40, dtype=dtype, scale=0.5, residual=True)
    no_worse_than(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))
