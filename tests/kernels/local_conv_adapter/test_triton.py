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
from fastadapt.kernels.local_conv_adapter import config, triton_kernel
from fastadapt.prove.judge import poisoned
from tests.kernels.local_conv_adapter.calls import ACTIVATIONS, DEVICE, Call, composed, fused, make, randn, results
from tests.tolerance import no_worse_than

triton = fused("triton")
bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def check(call: Call, kernels: int = 2) -> Tensor:
    """y, from so many launches and as near to float64's as eager's in the same dtype."""
    with torch.no_grad():
        with recording(arguments=False) as launches:
            y = triton(call)
        eager, exact = composed(call), composed(call.to(torch.float64))
    assert len(launches) == kernels and y.is_contiguous()
    no_worse_than({"y": y}, {"y": eager}, {"y": exact})
    return y


@pytest.mark.parametrize("scale", [0.3, "shared", "rows"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_scale(activation, scale):
    check(make(activation=activation, scale=scale, residual=scale != "shared", dtype=bf16))


@pytest.mark.parametrize("dilation", [1, 2, 2**40])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (3, 7), (7, 7)], ids=str)
def test_every_kernel_size_and_dilation(kernel, dilation):
    check(make(1, (5, 9), kernel=kernel, dilation=dilation, dtype=bf16))


@pytest.mark.parametrize(
    ("grid", "prefix_tokens"), [((16, 16), 1), ((7, 7), 5), ((5, 9), 0), ((1, 1), 1), ((1, 40), 0)], ids=str
)
def test_every_grid_and_prefix(grid, prefix_tokens):
    """Tiles that end in the middle of samples, and those that many samples share."""
    check(make(2, grid, prefix_tokens=prefix_tokens, dtype=bf16))


@pytest.mark.parametrize(("tile_rows", "grid"), [(16, (4, 9)), (64, (37, 37))], ids=str)
def test_tiles_of_either_height(tile_rows, grid, monkeypatch):
    monkeypatch.setattr(config, "tiles", lambda problem: config.Tiles(tile_rows, 16, 4, 4, 3))
    check(make(2 if tile_rows < 64 else 1, grid, 16, 16, 16, scale="rows", residual=True, dtype=bf16))


@pytest.mark.parametrize("sizes", [(16, 1, 33), (33, 17, 16), (80, 64, 144), (16, 256, 16), (7, 100, 100)], ids=str)
def test_every_width(sizes):
    check(make(1, (3, 3), *sizes, residual=True, dtype=bf16))


def test_no_samples():
    with recording() as launches:
        assert triton(make(0, dtype=bf16)).shape == (0, 13, 10)
    assert launches == []


def test_strided_tensors():
    call = make(residual=True, dtype=bf16)
    tensors = {
        "x": randn(3, 13, 36).to(bf16)[::2, :, 12:24],
        "residual": randn(13, 2, 30).to(bf16)[..., ::3].transpose(0, 1),
        "down_weight": call.tensors["down_weight"].detach().t().contiguous().t(),
    }
    call = Call(call.tensors | tensors, call.options)
    assert not any(call.tensors[name].is_contiguous() for name in tensors)
    check(call)


def test_what_the_kernel_can_read_is_not_copied():
    call, taps = make(residual=True, dtype=bf16), randn(3, 3, 5).to(bf16)
    packed = randn(2, 13, 36).to(bf16)
    call = Call(call.tensors | {"x": packed[..., 12:24], "weight": taps.permute(2, 0, 1)}, call.options)
    with recording() as launches:
        triton(call)
    read = {argument.data_ptr() for argument in launches[-1].args if isinstance(argument, Tensor)}
    assert {tensor.data_ptr() for tensor in call.tensors.values()} <= read


def test_without_biases():
    check(make(biases=False, dtype=torch.float16))


@pytest.mark.parametrize("h", [5, 144])
def test_float32_parameters_and_residual(h):
    """The weights are narrowed by one program and by several."""
    call = make(depth=16, h=h, width=16, scale="rows", residual=True, dtype=bf16, parameter_dtype=torch.float32)
    call.tensors["residual"] = randn(2, 13, 16)
    assert check(call).dtype == torch.float32


def test_float32_by_tf32s_kernel():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(make(2, (5, 9), residual=True, dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


FAR = 2**30 + 8  # elements between tokens, or samples: the third is past 2^31


@pytest.mark.parametrize("strides", [(8, FAR, 1), (FAR, 8, 1)], ids=["tokens", "samples"])
def test_offsets_past_2_to_the_31(strides):
    """Elements that 32-bit offsets would miss, in x and in the residual."""
    call = make(3, (1, 3), 8, 5, 8, prefix_tokens=0, residual=True, dtype=bf16)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it would become memory
    storage = torch.empty(2 * (strides[0] + strides[1]) + 8, dtype=bf16, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert storage.numel() > 2**31
    view = storage.as_strided((3, 3, 8), strides)
    view.copy_(randn(3, 3, 8))
    check(Call(call.tensors | {"x": view, "residual": view}, call.options))


def test_gradients_are_the_references_from_the_hidden_that_the_kernel_kept():
    call = make(2, (3, 4), 24, 16, 24, scale="rows", residual=True, dtype=bf16)
    no_worse_than(results(triton, call), results(composed, call), results(composed, call.to(torch.float64)))


def test_runs_are_bitwise_equal():
    call = make(dtype=bf16)
    assert torch.equal(triton(call), triton(call))


def test_every_kernel_is_among_those_that_run():
    with recording() as launches:
        triton(make(dtype=bf16))
    assert {launch.name for launch in launches} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}


def test_shapes_that_the_kernel_does_not_take_are_the_librarys():
    for call in (
        make(1, (2, 2), 16, 272, 16, dtype=bf16),
        make(1, (2, 2), dtype=torch.float32),
        make(1, (3, 200), 16, 4, 16, dtype=bf16),
    ):
        check(call, kernels=0)
