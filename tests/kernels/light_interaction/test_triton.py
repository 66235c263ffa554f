"""The Triton kernels on odd shapes: interpreted, or compiled where there is a GPU.

All memory that a call allocates starts as NaN, so an element that no kernel writes shows; interpreted kernels that
leave their arguments raise (fastadapt.prove.interpreter).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fastadapt.core.launch import recording
from fastadapt.prove.judge import poisoned
from tests.kernels.light_interaction.calls import (
    DEVICE,
    EVERYTHING,
    WEIGHTS,
    Call,
    composed,
    few_bits,
    fused,
    make,
    randn,
    results,
)
from tests.tolerance import DEEP, no_worse_than

triton, reference = fused("triton"), fused("reference")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def check(call: Call, grads: list[Tensor] | None = None, eager=composed) -> None:
    """Outputs and gradients are as near to float64's as torch's own attention in the same dtype."""
    exact = results(eager, call.to(torch.float64), grads and [grad.double() for grad in grads])
    no_worse_than(results(triton, call, grads), results(eager, call, grads), exact)


SIZES = {
    "one of each": (1, 1, 1, 16, 1),
    "a tile and one more": (2, 33, 5, 32, 4),
    "several tiles": (1, 70, 17, 64, 8),
    "all words there can be": (2, 50, 32, 16, 4),
    "half as many": (1, 40, 16, 32, 8),
    "heads of one column": (1, 20, 3, 16, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype):
    batch, tokens, words, width, heads = SIZES[size]
    check(make((batch, tokens, width), words, heads, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_widest(dtype):
    check(make((1, 20, 128), 5, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(dtype):
    check(make((4, 40, 32), 17, 4, mask=(17, 1, 9, 16), dtype=dtype))


def test_a_sample_without_a_word():
    check(make((3, 33, 16), 5, 4, mask=(0, 5, 2), dtype=torch.float32), eager=reference)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=["no sample", "no token", "no word"])
def test_empty(sizes):
    batch, tokens, words = sizes
    call = make((batch, tokens, 16), words, 4, dtype=torch.float32)
    torch.testing.assert_close(results(triton, call), results(reference, call), **DEEP)


LAYOUTS = {
    "x without its first row": lambda: (randn(2, 34, 32)[:, 1:], randn(2, 5, 32)),
    "rows before samples": lambda: (randn(33, 2, 32).transpose(0, 1), randn(5, 2, 32).transpose(0, 1)),
    "columns apart": lambda: (randn(2, 32, 33).transpose(1, 2), randn(2, 5, 64)[..., ::2]),
    "one sample for all": lambda: (randn(1, 33, 32).expand(2, -1, -1), randn(1, 5, 32).expand(2, -1, -1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_inputs_and_gradients(layout):
    (x, y), grads = LAYOUTS[layout](), list(LAYOUTS[layout]())
    check(make(x, y, 4, dtype=torch.float32), grads)


def test_any_layout_of_weights_and_mask():
    call = make((2, 20, 16), 5, 4, mask=(5, 2), dtype=torch.float32)
    turned = {name: t.detach().t().contiguous().t().requires_grad_() for name, t in call.tensors.items() if t.ndim == 2}
    spread = torch.zeros(2, 10, dtype=torch.bool, device=DEVICE)[:, ::2]
    check(replace(call.having(**turned), mask=spread.copy_(call.mask)))


def test_float32_weights_of_16_bit_inputs():
    check(make((2, 33, 32), 5, 4, dtype=torch.bfloat16, weight_dtype=torch.float32))


def test_float32_by_tf32s_kernels():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with recording() as launches:
            check(make((2, 33, 32), 5, 4, dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.meta["PRECISION"] for launch in launches if "PRECISION" in launch.meta} == {"tf32"}


NEEDS = [("x",), ("y",), ("out_bias[1]",), ("x", "in_bias[0]", "out_weight[1]"), WEIGHTS]


@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_only_some_gradients(needs):
    check(make((2, 33, 16), 5, 4, dtype=torch.float32, needs=needs))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_a_masked_word_holds_reaches_nothing_but_its_own_row(backend):
    call = make((2, 33, 16), 5, 4, mask=(3, 5), dtype=torch.float32)
    x, y = call.tensors["x"], call.tensors["y"].detach()
    grad = few_bits(y).masked_fill(call.mask[..., None], 0.0)  # a loss over the words that are there
    before = results(fused(backend), call, [few_bits(x), grad])
    other = call.having(y=y.masked_fill(call.mask[..., None], 7.0).requires_grad_())
    after = results(fused(backend), other, [few_bits(x), grad])
    before["y'"], after["y'"] = (found["y'"][~call.mask] for found in (before, after))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        image, words = fused(backend)(call.having(y=y.masked_fill(call.mask[..., None], torch.nan)))
    assert torch.equal(image, before["x'"]) and torch.equal(words[~call.mask], before["y'"])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_samples_know_nothing_of_each_other(backend):
    call = make((3, 33, 16), 5, 4, dtype=torch.float32, needs=("x", "y"))
    y = call.tensors["y"].detach().clone()
    y[1:] += 1.0
    before, after = results(fused(backend), call), results(fused(backend), call.having(y=y.requires_grad_()))
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert not torch.equal(before["x'"][1], after["x'"][1])


def test_large_scores_overflow_nothing():
    call = make((1, 40, 16), 5, 2, dtype=torch.float16)
    for direction in (0, 1):
        call.tensors[f"in_weight[{direction}]"].detach()[:32].mul_(8.0)  # scores in the hundreds: one word takes all
    check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(dtype):
    call = make((2, 70, 32), 17, 4, mask=(17, 8), dtype=dtype)
    first, second = results(triton, call), results(triton, call)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_second_derivatives_are_the_references():
    # with the weights asked for, torch composes its attention of functions that can be differentiated twice
    eager = partial(composed, need_weights=True)

    def curvature(function, call: Call) -> dict[str, Tensor]:
        wanted = list(call.tensors.values())
        slopes = torch.autograd.grad(sum(output.square().sum() for output in function(call)), wanted, create_graph=True)
        return dict(zip(EVERYTHING, torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted)))

    call = make((2, 5, 16), 3, 4, mask=(3, 2), dtype=torch.float32)
    exact = curvature(eager, call.to(torch.float64))
    no_worse_than(curvature(triton, call), curvature(eager, call), exact, slack={2: 2.0, torch.inf: 4.0})


def test_every_kernel_is_among_those_that_run():
    """These tests are of all kernels, or of too few."""
    from fastadapt.kernels.light_interaction import triton_kernel

    with recording() as launches:
        results(triton, make((1, 5, 16), 3, 4, dtype=torch.float32))
    assert {launch.name for launch in launches} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
