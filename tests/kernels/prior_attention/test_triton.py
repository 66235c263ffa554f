"""The Triton kernels on odd shapes: interpreted, or compiled where there is a GPU.

All memory that a call allocates starts as NaN, so an element that no kernel writes shows; interpreted kernels that
leave their arguments raise (fastadapt.prove.interpreter).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastadapt.core.launch import recording, target
from fastadapt.kernels.prior_attention import config
from fastadapt.prove.judge import poisoned
from tests.kernels.prior_attention.calls import (
    DEVICE,
    EVERYTHING,
    LAYOUTS,
    Call,
    composed,
    few_bits,
    fused,
    laid_out,
    make,
    randn,
    results,
)
from tests.tolerance import no_worse_than

triton = fused("triton")
every_mask = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """NaN in fresh memory, and kernels for float32: interpreted, TF32's are exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with poisoned():
        yield
    torch.set_float32_matmul_precision(before)


def check(call: Call, grad: Tensor | None = None) -> None:
    """Outputs and gradients are as near to float64's as those of the composition in the same dtype."""
    with recording() as launches:
        ours = results(triton, call, grad)
    assert launches
    eager = results(composed, call, grad)
    no_worse_than(ours, eager, results(composed, call.to(torch.float64), None if grad is None else grad.double()))


@every_mask
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 20, 77, 130, 256])
@pytest.mark.parametrize("head_width", config.HEAD_WIDTHS)
def test_every_head_width_and_any_number_of_keys(head_width, keys, masked):
    wide = 128 < keys and head_width == 64  # more than float32 tiles hold
    check(make(2, 37, keys, 2, head_width, masked=masked, dtype=torch.bfloat16 if wide else torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("keys", "head_width"), [(5, 8), (20, 64), (77, 32)])
def test_every_dtype(keys, head_width, dtype):
    check(make(2, 70, keys, 2, head_width, masked=True, dtype=dtype))


@pytest.mark.parametrize("queries", [1, 15, 16, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_queries(queries, dtype):
    check(make(2, queries, 17, 1, 16, dtype=dtype))


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_the_tiles_of_every_kind_of_gpu(arch):
    if DEVICE.type == "cuda":
        pytest.skip("a GPU has the tiles of its own kind")
    with target(arch):
        check(make(2, 70, 60, 1, 64, masked=True, dtype=torch.bfloat16))


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("dtype", "needs"),
    [(torch.float32, EVERYTHING), (torch.bfloat16, EVERYTHING), (torch.bfloat16, ("k",)), (torch.bfloat16, ("v",))],
    ids=str,
)
def test_any_number_of_runs_of_queries(splits, dtype, needs, monkeypatch):
    """The last of five runs has no query left."""
    monkeypatch.setattr(config, "splits", lambda problem, summed: splits)
    check(make(2, 250, 20, 1, 16, masked=True, dtype=dtype, needs=needs))


@pytest.mark.parametrize("needs", [("q",), ("k",), ("v",), ("q", "k"), ("q", "v"), ("k", "v")], ids="+".join)
def test_only_some_gradients(needs):
    check(make(2, 70, 20, 2, 16, masked=True, dtype=torch.float32, needs=needs))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@every_mask
def test_nothing_to_attend_with_or_to(empty, masked):
    call = make(**{empty: 0}, masked=masked, dtype=torch.float32)
    found = results(triton, call)
    assert found["out"].shape == call.q.shape and not found["out"].any()
    for name, tensor in call.tensors.items():
        assert found[f"d {name}"].shape == tensor.shape and not found[f"d {name}"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(layout, dtype):
    q, k, v, grad = (laid_out(layout, rows, 16, dtype) for rows in (37, 5, 5, 37))
    call = replace(make(3, 37, 5, masked=True, dtype=dtype), q=q, k=k, v=v).requiring(*EVERYTHING)
    check(call, grad)


def test_rows_with_adjacent_columns_are_not_copied():
    packed = randn(2, 5, 48).bfloat16()
    q, k, v = packed.split(16, -1)
    call = replace(make(2, 5, 5, dtype=torch.bfloat16), q=q, k=k, v=v)
    with recording() as launches:
        triton(call)
    assert all(argument is tensor for argument, tensor in zip(launches[0].args, (q, k, v)))


def test_a_mask_of_any_layout():
    mask = torch.rand(20, 3, device=DEVICE).t() < 0.4
    check(replace(make(3, 37, 20, dtype=torch.float32), mask=mask))
    check(replace(make(3, 37, 20, dtype=torch.float32), mask=mask[:1].expand(3, 20)))


def test_the_gradient_of_a_sum():
    call = make(2, 37, 20, masked=True, dtype=torch.float32)
    check(call, torch.ones((), device=DEVICE).expand(call.q.shape))


@pytest.mark.parametrize("scale", [1.0, -0.7, 0.0, 5.0])
def test_any_scale(scale):
    check(replace(make(2, 37, 20, 2, 16, masked=True, dtype=torch.float32), scale=scale))


FAR = 2**30 + 8  # elements between rows, or samples: the third is past 2^31


def spread(strides: tuple[int, int, int]) -> Tensor:
    """Random (3, 3, 8) strided over more than 2^31 bfloat16 elements, of which only those ever become memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it would become memory
    storage = torch.empty(2 * (strides[0] + strides[1]) + 8, dtype=torch.bfloat16, device=DEVICE)
    assert storage.numel() > 2**31
    view = storage.as_strided((3, 3, 8), strides)
    view.copy_(randn(3, 3, 8))
    torch.utils.deterministic.fill_uninitialized_memory = True
    return view


@pytest.mark.parametrize("strides", [(8, FAR, 1), (FAR, 8, 1)], ids=["rows", "samples"])
def test_offsets_past_2_to_the_31(strides):
    """Elements that 32-bit offsets would miss, in q, k, v and the gradient."""
    q, k, v, grad = (spread(strides) for _ in range(4))
    call = replace(make(3, 3, 3, 1, 8, dtype=torch.bfloat16), q=q, k=k, v=v).requiring(*EVERYTHING)
    check(call, grad)


def test_every_kernel_is_among_those_that_run(monkeypatch):
    """These tests are of all kernels, or of too few."""
    from fastadapt.kernels.prior_attention import triton_kernel

    monkeypatch.setattr(config, "splits", lambda problem, summed: 2)
    call = make(1, 100, 5, 1, 8, dtype=torch.float32)
    with recording() as launches:
        out = triton(call)
        torch.autograd.backward(out, few_bits(out))
    assert {launch.name for launch in launches} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
