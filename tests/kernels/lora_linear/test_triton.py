"""The Triton kernels, each way they can be combined, on odd shapes: interpreted, or compiled where there is a GPU.

All memory that a call allocates starts as NaN, so an element that no kernel writes shows; interpreted kernels that
leave their arguments raise (fastadapt.prove.interpreter).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastadapt.core.launch import recording
from fastadapt.kernels.lora_linear import config
from fastadapt.prove.judge import poisoned
from tests.kernels.lora_linear.calls import (
    DEVICE,
    EVERYTHING,
    LAYOUTS,
    Call,
    composed,
    fused,
    laid_out,
    make,
    randn,
    results,
)
from tests.tolerance import DEEP, no_worse_than

triton = fused("triton")


def dtypes(*names: str):
    return pytest.mark.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)


every_dtype = dtypes("float32", "float16", "bfloat16")
every_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.1])
# merging needs no mask between the factors, and "library" is the reference itself
WAYS = [("fused", 0.0), ("fused", 0.1), ("split", 0.0), ("split", 0.1), ("merge", 0.0)]
BRIEFLY = [("fused", 0.1), ("split", 0.1), ("merge", 0.0)]
every_way = pytest.mark.parametrize(("algorithm", "dropout_p"), WAYS)
every_algorithm = pytest.mark.parametrize(("algorithm", "dropout_p"), BRIEFLY)
# float32 shows a wrong element best, bfloat16 has other tiles
every_way_in_two_dtypes = pytest.mark.parametrize(
    ("algorithm", "dropout_p", "dtype"),
    [
        pytest.param(*way, getattr(torch, dtype), id=f"{way[0]}-{way[1]}-{dtype}")
        for dtype, ways in (("float32", WAYS), ("bfloat16", BRIEFLY))
        for way in ways
    ],
)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def choose(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    monkeypatch.setattr(config, "algorithm", lambda problem: algorithm)


def check(call: Call, grads: list[Tensor] | None = None) -> None:
    """Outputs and gradients are as near to float64's as eager PEFT's in the same dtype."""
    ours, eager = results(triton, call, grads), results(composed, call, grads)
    no_worse_than(ours, eager, results(composed, call.to(torch.float64), grads and [grad.double() for grad in grads]))


@every_way_in_two_dtypes
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 256])
def test_every_rank(rank, algorithm, dropout_p, dtype, monkeypatch):
    if algorithm == "fused":
        rank = min(rank, 64)  # wider ones never are
    choose(monkeypatch, algorithm)
    check(make((37, 72), (88,), (rank,), dropout_p=dropout_p, dtype=dtype))


SIZES = {
    "one element": (1, 1, 1),
    "one tile exactly": (64, 64, 64),
    "several tiles exactly": (128, 128, 128),
    "a little more than a tile": (65, 72, 136),
    "a little less": (63, 56, 120),
    "rows that 16 bytes do not divide": (33, 77, 51),
    "wide and flat": (3, 24, 600),
    "several runs of rows": (300, 16, 24),
}


@every_way_in_two_dtypes
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, algorithm, dropout_p, dtype, monkeypatch):
    rows, depth, width = SIZES[size]
    choose(monkeypatch, algorithm)
    check(make((rows, depth), (width,), (5,), dropout_p=dropout_p, dtype=dtype))


GROUPS = {
    "query, key and value": {"widths": (40, 40, 40), "ranks": (8, 8, 8)},
    "unequal": {"widths": (72, 8, 136), "ranks": (3, 33, 16), "biases": (True, False, True)},
    "without bias": {"widths": (40, 24), "ranks": (3, 8), "biases": (False, False)},
}


@every_way_in_two_dtypes
@pytest.mark.parametrize("group", GROUPS)
def test_every_group(group, algorithm, dropout_p, dtype, monkeypatch):
    choose(monkeypatch, algorithm)
    check(make((35, 72), **GROUPS[group], dropout_p=dropout_p, dtype=dtype))


@every_algorithm
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout, algorithm, dropout_p, monkeypatch):
    choose(monkeypatch, algorithm)
    check(make(laid_out(layout, torch.float32), (24, 8), (3, 5), dropout_p=dropout_p, dtype=torch.float32))


@every_algorithm
@pytest.mark.parametrize("layout", [*(name for name in LAYOUTS if "expanded" not in name), "one number"])
def test_any_layout_of_the_outputs_gradient(layout, algorithm, dropout_p, monkeypatch):
    choose(monkeypatch, algorithm)
    grad = randn(1).expand(6, 20) if layout == "one number" else laid_out(layout, torch.float32)
    check(make((*grad.shape[:-1], 24), (20,), (3,), dropout_p=dropout_p, dtype=torch.float32), [grad])


@every_way
def test_any_layout_of_the_weights(algorithm, dropout_p, monkeypatch):
    choose(monkeypatch, algorithm)
    call = make((20, 40), (40,), (40,), dropout_p=dropout_p, dtype=torch.float32)
    weight, bias, lora_a, lora_b = (tensor.detach() for tensor in call.members[0])
    turned = call.members[0]._replace(weight=weight.t(), bias=bias, lora_a=lora_a.t(), lora_b=lora_b.t())
    check(replace(call, members=(turned,)).requiring("x", "lora_a", "lora_b"))


@every_dtype
@every_dropout
def test_the_algorithm_that_is_chosen(dtype, dropout_p):
    check(make((5, 14, 72), (88,), (16,), dropout_p=dropout_p, dtype=dtype, needs=EVERYTHING))


@every_dropout
def test_float32_by_tf32s_kernels(dropout_p):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with recording() as launches:
            check(make((37, 72), (88,), (16,), dropout_p=dropout_p, dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.meta["PRECISION"] for launch in launches if "PRECISION" in launch.meta} == {"tf32"}


@dtypes("float16", "bfloat16")
@every_way
def test_float32_adapters(algorithm, dropout_p, dtype, monkeypatch):
    choose(monkeypatch, algorithm)
    tensors = {"dtype": dtype, "adapter_dtype": torch.float32, "needs": EVERYTHING}
    check(make((37, 72), (88,), (16,), dropout_p=dropout_p, **tensors))


def test_adapters_of_unlike_dtypes_in_one_group():
    narrow = make((37, 72), dropout_p=0.1, dtype=torch.bfloat16)
    wide = make((37, 72), dtype=torch.bfloat16, adapter_dtype=torch.float32)
    check(replace(narrow, members=narrow.members + wide.members, scales=(0.5, 2.0)))


NEEDS = [("x",), ("lora_b",), ("lora_a", "lora_b"), ("lora_a[0]", "lora_b[1]"), ("x", "weight[1]", "bias[0]")]


@every_algorithm
@pytest.mark.parametrize("needs", [*NEEDS, EVERYTHING], ids="+".join)
def test_only_some_gradients(needs, algorithm, dropout_p, monkeypatch):
    choose(monkeypatch, algorithm)
    check(make((37, 72), (40, 24), (3, 16), dropout_p=dropout_p, dtype=torch.float32, needs=needs))


@every_dropout
def test_second_derivatives_are_the_references(dropout_p):
    call = make((5, 8), (6,), (3,), dropout_p=dropout_p, dtype=torch.float32)
    wanted = [call.x, call.members[0].lora_a, call.members[0].lora_b]

    def curvature(function) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        (y,) = function(call)
        slopes = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted)

    torch.testing.assert_close(curvature(triton), curvature(composed), **DEEP)


FAR = 2**29 + 8  # elements between rows, or columns: the sixth is past 2^31


def spread(rows: int, columns: int, strides: tuple[int, int]) -> Tensor:
    """Random numbers strided over more than 2^31 bfloat16 elements, of which only those ever become memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it would become memory
    storage = torch.empty((rows - 1) * strides[0] + (columns - 1) * strides[1] + 1, dtype=torch.bfloat16, device=DEVICE)
    assert storage.numel() > 2**31
    view = storage.as_strided((rows, columns), strides)
    view.copy_(randn(rows, columns))
    torch.utils.deterministic.fill_uninitialized_memory = True
    return view


@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR)], ids=["rows", "columns"])
@every_way
def test_offsets_past_2_to_the_31(algorithm, dropout_p, strides, monkeypatch):
    """Elements that 32-bit offsets would miss, in x and in the gradient of the output."""
    choose(monkeypatch, algorithm)
    x, grad = spread(6, 6, strides), spread(6, 6, strides)
    call = make(x, (6,), (3,), dropout_p=dropout_p, dtype=torch.bfloat16)
    assert call.x.data_ptr() == x.data_ptr()
    check(call, [grad])


@every_dropout
def test_vit_width(dropout_p):
    check(make((50, 768), (768,), (16,), dropout_p=dropout_p, dtype=torch.bfloat16))


def test_every_kernel_is_among_those_that_run(monkeypatch):
    """These tests are of all kernels, or of too few."""
    from fastadapt.kernels.lora_linear import triton_kernel

    seen = set()
    for algorithm, dropout_p in WAYS:
        choose(monkeypatch, algorithm)
        with recording() as launches:
            results(triton, make((5, 8), dropout_p=dropout_p, dtype=torch.float32))
        seen |= {launch.name for launch in launches}
    assert seen == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
