"""The Triton kernels on odd shapes: interpreted, or compiled where there is a GPU.

All memory that a call allocates starts as NaN, so an element that no kernel writes shows; interpreted kernels that
leave their arguments raise (fastadapt.prove.interpreter).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from fastadapt.core.launch import recording
from fastadapt.kernels.local_dwconv import config, triton_kernel
from fastadapt.prove.judge import poisoned
from tests.kernels.local_dwconv.calls import DEVICE, EVERYTHING, LAYOUTS, Call, composed, fused, laid_out, make, randn, results
from tests.tolerance import DEEP, no_worse_than

triton = fused("triton")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def check(call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Results and gradients, which are as near to float64's as eager's in the same dtype."""
    ours, eager = results(triton, call, grad), results(composed, call, grad)
    no_worse_than(ours, eager, results(composed, call.to(torch.float64), None if grad is None else grad.double()))
    return ours


@pytest.mark.parametrize("kernel", [*product((3, 5, 7), repeat=2)], ids=str)
def test_every_kernel_size(kernel):
    check(make(1, (4, 3), kernel=kernel, dtype=torch.float32))


@pytest.mark.parametrize("dilation", [2, 3, 4, 2**40])
@pytest.mark.parametrize("kernel", [(3, 5), (5, 3)], ids=str)
def test_every_dilation(kernel, dilation):
    check(make(1, (7, 4), kernel=kernel, dilation=dilation, dtype=torch.float32))


@pytest.mark.parametrize("grid", [(16, 16), (7, 7), (5, 9), (1, 1), (1, 17), (9, 1)], ids=str)
def test_every_grid(grid):
    check(make(1, grid, dtype=torch.bfloat16))


def test_a_grid_of_37_by_37():
    check(make(1, (37, 37), 2, dtype=torch.float32))


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_any_number_of_samples(batch):
    check(make(batch, (2, 2), dtype=torch.float32))


@pytest.mark.parametrize("needs", [EVERYTHING, ("bias",)], ids="+".join)
def test_no_samples(needs):
    found = results(triton, make(0, needs=needs, dtype=torch.float32))
    assert found.pop("y").shape == (0, 46, 6)
    assert not any(gradient.any() for name, gradient in found.items() if name != "d x")


@pytest.mark.parametrize("prefix_tokens", [0, 1, 5, 20])
def test_prefix_tokens_and_their_gradients_pass_bit_for_bit(prefix_tokens):
    call = make(2, (2, 3), prefix_tokens=prefix_tokens, dtype=torch.bfloat16)
    grad = randn(call.x.shape).bfloat16()
    found = check(call, grad)
    assert torch.equal(found["y"][:, :prefix_tokens], call.x[:, :prefix_tokens])
    assert torch.equal(found["d x"][:, :prefix_tokens], grad[:, :prefix_tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 32, 33, 100, 128, 136])
def test_any_number_of_channels(channels, dtype):
    check(make(1, (2, 3), channels, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters(dtype):
    call = make(2, (3, 9), dtype=dtype, parameter_dtype=torch.float32)
    found = check(call)
    assert found["d weight"].dtype == found["d bias"].dtype == torch.float32 and found["d x"].dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    call = replace(make(3, (2, 5), dtype=torch.float32), x=laid_out(layout, 11, 6, torch.float32)).requiring(*EVERYTHING)
    found = check(call, laid_out(layout, 11, 6, torch.float32))
    assert found["y"].is_contiguous() and found["d x"].is_contiguous()


def test_the_gradient_of_a_sum():
    check(make(2, (2, 5), dtype=torch.float32), torch.ones((), device=DEVICE).expand(2, 11, 6))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_weights_gradient_lies_as_the_weight_does(order, batch):
    call = make(batch, (2, 5), dtype=torch.float32)
    inverse = [order.index(i) for i in range(3)]
    weight = call.weight.detach().permute(order).contiguous().permute(inverse)
    found = check(replace(call, weight=weight).requiring(*EVERYTHING))
    assert found["d weight"].stride() == weight.stride()


def test_what_the_kernels_can_read_is_not_copied():
    packed = randn(2, 11, 18).bfloat16()
    taps = randn(3, 3, 6).bfloat16()
    call = replace(make(2, (2, 5), dtype=torch.bfloat16), x=packed[..., 6:12], weight=taps.permute(2, 0, 1))
    with recording() as launches:
        triton(call)
    assert [argument.data_ptr() for argument in launches[0].args[:3]] == [
        tensor.data_ptr() for tensor in (call.x, taps, call.bias)
    ]


@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias",), ("x", "weight"), ("weight", "bias")], ids="+".join)
def test_only_some_gradients(needs):
    check(make(2, (3, 4), needs=needs, dtype=torch.float32))


def test_without_a_bias():
    check(make(2, (3, 4), bias=False, dtype=torch.float32))


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_partial_sums_of_any_number(splits, bias, monkeypatch):
    monkeypatch.setattr(config, "tile_splits", lambda problem, tiles: splits)
    check(make(5, (2, 3), bias=bias, dtype=torch.float32))


def test_many_partial_sums():
    """More than one step of sum_kernel adds up."""
    check(make(40, (1, 2), dtype=torch.float32, needs=("weight", "bias")))


FAR = 2**30 + 8  # elements between tokens, or samples: the third is past 2^31


def spread(strides: tuple[int, int, int]) -> Tensor:
    """Random (3, 3, 8) strided over more than 2^31 bfloat16 elements, of which only those ever become memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it would become memory
    storage = torch.empty(2 * (strides[0] + strides[1]) + 8, dtype=torch.bfloat16, device=DEVICE)
    assert storage.numel() > 2**31
    view = storage.as_strided((3, 3, 8), strides)
    view.copy_(randn(3, 3, 8))
    torch.utils.deterministic.fill_uninitialized_memory = True
    return view


@pytest.mark.parametrize("strides", [(8, FAR, 1), (FAR, 8, 1)], ids=["tokens", "samples"])
@pytest.mark.parametrize(("grid", "prefix_tokens"), [((1, 3), 0), ((3, 1), 0), ((1, 1), 2)])
def test_offsets_past_2_to_the_31(grid, prefix_tokens, strides):
    """Elements that 32-bit offsets would miss, in x and in the gradient: in columns, in rows, and behind a prefix."""
    call = make(3, grid, 8, prefix_tokens=prefix_tokens, dtype=torch.bfloat16)
    check(replace(call, x=spread(strides)).requiring(*EVERYTHING), spread(strides))


def test_second_derivatives_are_the_references():
    call = make(1, (3, 4), 2, dtype=torch.float32)

    def curvature(function) -> tuple[Tensor, ...]:
        tensors = list(call.tensors.values())
        slopes = torch.autograd.grad(function(call).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), tensors)

    torch.testing.assert_close(curvature(triton), curvature(composed), **DEEP)


def test_every_kernel_is_among_those_that_run():
    with recording() as launches:
        results(triton, make(2, (2, 3), dtype=torch.float32))
    assert {launch.name for launch in launches} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}


LAUNCHES = {
    EVERYTHING: ["conv_kernel", "weight_grad_kernel", "sum_kernel"],
    ("weight", "bias"): ["weight_grad_kernel", "sum_kernel"],
    ("x",): ["conv_kernel"],
    ("bias",): [],  # torch's sum
}


@pytest.mark.parametrize("needs", LAUNCHES, ids="+".join)
@pytest.mark.parametrize(("batch", "grid"), [(32, (37, 37)), (1, (7, 7))])
def test_one_launch_forward_and_at_most_three_backward(batch, grid, needs):
    call = make(batch, grid, 768, dtype=torch.bfloat16, needs=needs).to("meta")
    with recording() as forward:
        y = triton(call)
    with recording() as backward:
        torch.autograd.backward(y, torch.empty_like(y))
    expected = [name for name in LAUNCHES[needs] if batch > 1 or name != "sum_kernel"]  # one tile needs no partial sums
    assert ([launch.name for launch in forward], [launch.name for launch in backward]) == (["conv_kernel"], expected)
