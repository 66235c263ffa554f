"""The Triton kernels on odd shapes: interpreted, or compiled where there is a GPU.

All memory that a call allocates starts as NaN, so an element that no kernel writes shows; interpreted kernels that
leave their arguments raise (fastadapt.prove.interpreter).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastadapt.core.launch import recording
from fastadapt.kernels.bottleneck_adapter import config, triton_kernel
from fastadapt.prove.judge import poisoned
from tests.kernels.bottleneck_adapter.calls import ACTIVATIONS, DEVICE, Call, as_near_as_eager, composed, fused, make, randn, results
from tests.kernels.bottleneck_adapter.test_reference import KINDS, LAYOUTS
from tests.tolerance import DEEP

triton = fused("triton")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def check(call: Call, grad: Tensor | None = None) -> None:
    """Outputs and gradients are as near to float64's as eager's in the same dtype."""
    ours, eager = results(triton, call, grad), results(composed, call, grad)
    as_near_as_eager(ours, eager, results(composed, call.to(torch.float64), None if grad is None else grad.double()))


@every_kind
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_and_activation(kind, activation, dtype):
    check(make((37, 72), 17, 40, **KINDS[kind], activation=activation, dtype=dtype))


@every_kind
def test_float16(kind):
    check(make((3, 23, 72), 17, 88, **KINDS[kind], dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h", [1, 8, 16, 33, 64, 128, 256])
def test_every_hidden_width(h, dtype):
    if dtype is torch.float32:
        h = min(h, config.WIDEST_HIDDEN["exact"])  # wider ones are the library's
    check(make((35, 40), h, 56, norm=True, scale="rows", dtype=dtype))


SIZES = {
    "one row": (1, 8, 24),
    "one tile exactly": (64, 64, 64),
    "several tiles exactly": (128, 128, 128),
    "a little more than a tile": (65, 72, 136),
    "a little less": (63, 56, 120),
    "rows that 16 bytes do not divide": (33, 77, 51),
    "wide and flat": (3, 24, 600),
    "several runs of rows": (300, 16, 24),
}


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype, norm):
    rows, depth, width = SIZES[size]
    check(make((rows, depth), 24, width, norm=norm, residual=True, scale="rows", dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout):
    x = LAYOUTS[layout]()
    strided = torch.empty_strided(x.shape, x.stride(), dtype=torch.float32, device=DEVICE)
    if "expanded" not in layout:
        strided.copy_(x)
    else:
        strided = x[:1].float().expand(x.shape)
    check(make(strided, norm=True, residual=True, scale="rows"))


@pytest.mark.parametrize("layout", [*(name for name in LAYOUTS if name != "expanded"), "one number"])
def test_any_layout_of_the_outputs_gradient(layout):
    grad = randn(1).expand(6, 14) if layout == "one number" else LAYOUTS[layout]().float()
    if layout == "sliced":
        grad = randn(6, 5, 50)[::2, 1:, 3:31:2]
    check(make((*grad.shape[:-1], 20), 5, 14, norm=True, residual=True, dtype=torch.float32), grad)


def test_strided_parameters_and_residual():
    call = make((12, 40), 40, 40, norm=True, scale="rows", residual=True, dtype=torch.float32)
    turned = {name: t.detach().t() if t.shape == (40, 40) else t.detach() for name, t in call.tensors.items()}
    turned["residual"], turned["scale"] = randn(40, 12).t(), randn(24)[::2]
    check(Call(turned, call.options).requiring(*turned))


@pytest.mark.parametrize("needs", [
    ("x",), ("up_weight",), ("up_bias",), ("scale",), ("residual",), ("down_bias",), ("norm_bias",), ("norm_weight", "scale"),
    ("down_weight", "up_bias"), ("x", "residual"), ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias"),
], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("scale", ["shared", "rows"])
def test_only_some_gradients(needs, scale):
    check(make((37, 72), norm=True, scale=scale, residual=True, dtype=torch.float32).requiring(*needs))


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_partial_sums_of_any_number(splits, monkeypatch):
    monkeypatch.setattr(config, "row_splits", lambda *sizes: splits)
    check(make((300, 24), 5, 40, norm=True, scale="shared", dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters(dtype):
    call = make((37, 72), norm=True, scale="rows", residual=True, dtype=dtype, parameter_dtype=torch.float32)
    found = results(triton, call)
    assert found["d down_weight"].dtype == found["d scale"].dtype == torch.float32 and found["d x"].dtype == dtype
    check(call)


def test_a_float32_residual_under_16_bits():
    """The stream stays float32: y is added to it unrounded, and its gradient comes back as it is."""
    call = make((37, 72), norm=True, residual=True, dtype=torch.bfloat16)
    call.tensors["residual"] = randn(37, 12).requires_grad_()
    found, expected = results(triton, call), results(composed, call)
    assert found["y"].dtype == found["d residual"].dtype == torch.float32
    as_near_as_eager(found, expected, results(composed, call.to(torch.float64)))


def test_float32_by_tf32s_kernels():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with recording() as launches:
            check(make((37, 72), norm=True, dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.meta["PRECISION"] for launch in launches} == {"tf32"}


def test_a_large_mean_costs_layer_norm_no_digits():
    check(make(1e3 + randn(40, 72), norm=True))


def test_second_derivatives_are_the_references():
    call = make((5, 8), 4, 6, norm=True, scale="rows", activation="gelu", dtype=torch.float32)
    wanted = list(call.tensors.values())

    def curvature(function) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(function(call).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted)

    torch.testing.assert_close(curvature(triton), curvature(composed), **DEEP)


FAR = 2**29 + 8  # elements between rows, or columns: the sixth is past 2^31


def spread(strides: tuple[int, int]) -> Tensor:
    """Random numbers strided over more than 2^31 bfloat16 elements, of which only those ever become memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it would become memory
    storage = torch.empty(5 * sum(strides) + 1, dtype=torch.bfloat16, device=DEVICE)
    assert storage.numel() > 2**31
    view = storage.as_strided((6, 6), strides)
    view.copy_(randn(6, 6))
    torch.utils.deterministic.fill_uninitialized_memory = True
    return view


@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR)], ids=["rows", "columns"])
def test_offsets_past_2_to_the_31(strides):
    """Elements that 32-bit offsets would miss, in x, in the residual and in the gradient of the output."""
    call = make(spread(strides), 4, 6, norm=True)
    tensors = call.tensors | {"residual": spread(strides)}
    check(Call(tensors, call.options).requiring(*tensors), spread(strides))


def test_vit_width():
    check(make((50, 768), 64, 768, norm=True, residual=True, activation="gelu", dtype=torch.bfloat16))


def test_every_kernel_is_among_those_that_run():
    with recording() as launches:
        results(triton, make((5, 8), dtype=torch.float32))
    assert {launch.name for launch in launches} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}


LAUNCHES = {
    ("x", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias", "scale", "residual"): 2,
    ("down_weight", "up_weight"): 2,
    ("x",): 1,
    ("up_weight", "up_bias"): 1,
    ("residual",): 0,
}


@pytest.mark.parametrize("needs", LAUNCHES, ids="+".join)
@pytest.mark.parametrize("scale", ["shared", "rows"])
def test_one_launch_forward_and_at_most_two_backward(needs, scale):
    call = make((6304, 768), 64, 768, norm=True, scale=scale, residual=True, dtype=torch.bfloat16).requiring(*needs).to("meta")
    with recording() as forward:
        y = triton(call)
    with recording() as backward:
        torch.autograd.backward(y, torch.empty_like(y))
    assert (len(forward), len(backward)) == (1, LAUNCHES[needs])


def test_shapes_that_the_kernels_do_not_take_are_the_librarys():
    for call in (make((9, 40), 300, dtype=torch.bfloat16), make((4096, 4), 2, 3, dtype=torch.float32)):
        with recording() as launches:
            check(call)
        assert launches == []
