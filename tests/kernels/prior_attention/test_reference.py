"""The reference in float64 against a composition of torch functions and against differences, and in lower precisions."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from fastadapt import prior_attention
from tests.kernels.prior_attention.calls import EVERYTHING, LAYOUTS, Call, composed, fused, laid_out, make, results
from tests.tolerance import EXACT, no_worse_than

reference = fused("reference")
every_mask = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])


def check(call: Call, grad: Tensor | None = None) -> None:
    torch.testing.assert_close(results(reference, call, grad), results(composed, call, grad), **EXACT)


SIZES = {
    "some": {},
    "one of each": {"batch": 1, "queries": 1, "keys": 1, "num_heads": 1, "head_width": 1},
    "heads of any width": {"num_heads": 3, "head_width": 5},
    "as many keys as queries": {"queries": 12, "keys": 12},
    "more keys than the kernels take": {"keys": 300},
}


@every_mask
@pytest.mark.parametrize("size", SIZES)
def test_values_and_every_gradient(size, masked):
    check(make(**SIZES[size], masked=masked))


@pytest.mark.parametrize("scale", [0.3, 1.0, -2.0, 0.0])
def test_any_scale(scale):
    check(replace(make(masked=True), scale=scale))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@every_mask
def test_nothing_to_attend_with_or_to(empty, masked):
    call = make(**{empty: 0}, masked=masked)
    found = results(reference, call)
    assert found["out"].shape == call.q.shape and not found["out"].any()
    for name, tensor in call.tensors.items():
        assert found[f"d {name}"].shape == tensor.shape and not found[f"d {name}"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    q, k, v = (laid_out(layout, rows, 16, torch.float64) for rows in (7, 5, 5))
    call = replace(make(batch=3, queries=7, masked=True), q=q, k=k, v=v).requiring(*EVERYTHING)
    check(call)
    check(call, laid_out(layout, 7, 16, torch.float64))


SUBSETS = list(chain.from_iterable(combinations(EVERYTHING, n) for n in range(1, 4)))


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(needs):
    check(make(masked=True, needs=needs))


def test_it_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    torch.nn.init.zeros_(attention.in_proj_bias)
    q, k, v = (torch.randn(2, rows, 16, dtype=torch.float64) for rows in (9, 5, 5))
    mask = torch.tensor([[False] * 5, [False, True, False, True, True]])
    expected, _ = attention(q, k, v, key_padding_mask=mask)
    projected = (x @ weight.t() for x, weight in zip((q, k, v), attention.in_proj_weight.chunk(3)))
    out = prior_attention(*projected, num_heads=2, key_padding_mask=mask)
    torch.testing.assert_close(attention.out_proj(out), expected, **EXACT)


@every_mask
def test_derivatives_of_first_and_second_order(masked):
    call = make(queries=3, keys=4, head_width=2, masked=masked)

    def function(*tensors: Tensor) -> Tensor:
        return reference(call.with_tensors(*tensors))

    assert torch.autograd.gradcheck(function, list(call.tensors.values()))
    assert torch.autograd.gradgradcheck(function, list(call.tensors.values()))


@every_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype, masked):
    call = make(3, 65, 20, 2, 32, masked=masked, dtype=dtype)
    no_worse_than(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))


def test_scores_beyond_float16s_range_are_scaled_before_they_are_rounded():
    """16 products of 100 and 100 are 160 000, where 65 504 is the largest number; scaled by 1/4 they are 40 000."""
    call = make(1, 3, 2, 1, 16, dtype=torch.float16)
    call = replace(call, q=torch.full_like(call.q, 100.0), k=torch.full_like(call.k, 100.0)).requiring(*EVERYTHING)
    found, exact = results(reference, call), results(composed, call.to(torch.float64))
    assert all(tensor.isfinite().all() for tensor in found.values())
    torch.testing.assert_close(found["out"].double(), exact["out"], rtol=1e-3, atol=1e-3)


def test_what_a_masked_key_holds_reaches_nothing():
    call = make(masked=True)
    hidden = call.mask[..., None].expand_as(call.k)
    spoilt = {name: torch.where(hidden, torch.nan, getattr(call, name).detach()) for name in ("k", "v")}
    spoilt = replace(call, q=call.q.detach(), **spoilt).requiring(*EVERYTHING)
    found, expected = results(reference, spoilt), results(reference, call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tensors = list(spoilt.tensors.values())
    slopes = torch.autograd.grad(reference(spoilt).square().sum(), tensors, create_graph=True)
    curvatures = torch.autograd.grad(sum(slope.square().sum() for slope in slopes), tensors)
    assert all(curvature.isfinite().all() for curvature in curvatures)
