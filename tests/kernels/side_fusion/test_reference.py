"""The reference, in float64, against a composition of torch functions and against differences."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from tests.kernels.side_fusion.calls import (
    ACTIVATIONS, IEA, KINDS, LINEAR, TEXT_IEA, VEA, Call, Spec, composed, fused, make, randn, results, tower,
)  # fmt: skip
from tests.tolerance import EXACT, no_worse_than

reference = fused("reference")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def check(call: Call, grad: Tensor | None = None) -> None:
    torch.testing.assert_close(results(reference, call, grad), results(composed, call, grad), **EXACT)


@every_activation
@every_kind
def test_values_and_every_gradient(kind, activation):
    check(make((3, 5), [replace(KINDS[kind], activation=activation)] * 2, 1))


MIXED = [VEA, IEA, replace(TEXT_IEA, depth=9, hidden=3), LINEAR, replace(VEA, depth=2, hidden=17, activation="gelu")]


@pytest.mark.parametrize("bases", [0, 1, 3, 12])
def test_any_mixture_of_adapters_and_any_number_of_bases(bases):
    check(make((7,), MIXED, bases))


def test_the_same_projection_in_several_adapters_gets_the_sum_of_their_gradients():
    call = make((4, 3), [replace(IEA, share="both"), replace(IEA, share="both", depth=4), replace(IEA, scale=0.5)])
    assert sum(name.endswith("shared_weight") for name in call.tensors) == 2
    check(call)


@pytest.mark.parametrize(("kind", "sizes"), [("vision", (16, 8, 16)), ("text", (48, 8, 16))])
def test_the_towers_of_m2ist(kind, sizes):
    check(make((3, 7), tower(kind, *sizes), 2))


@pytest.mark.parametrize(("kind", "rows", "sizes"), [("vision", 40, (256, 128, 256)), ("text", 20, (768, 128, 256))])
def test_the_towers_of_m2ist_at_their_real_widths(kind, rows, sizes):
    check(make((2, rows), tower(kind, *sizes), 2))


# of a function that draws normal numbers in the dtype wanted
LAYOUTS = {
    "vector": lambda draw: draw(14),
    "transposed": lambda draw: draw(14, 9).t(),
    "tokens first": lambda draw: draw(4, 3, 14).transpose(0, 1),
    "sliced": lambda draw: draw(6, 5, 50)[::2, 1:, 3:31:2],
    "four dimensions": lambda draw: draw(2, 14, 3, 2).movedim(1, -1),
    "expanded": lambda draw: draw(1, 14).expand(6, 14),
    "no rows": lambda draw: draw(0, 14),
    "no rows in 3-D": lambda draw: draw(3, 0, 14),
}
double = partial(randn, dtype=torch.float64)
ALL = [replace(spec, depth=14) for spec in (VEA, TEXT_IEA, LINEAR)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_taps(layout):
    call = make(LAYOUTS[layout](double), ALL, 1)
    assert call.tensors["0 tap"].stride() == LAYOUTS[layout](double).stride()
    check(call)


def test_any_layout_of_the_other_tensors():
    call = make((4, 8), [replace(VEA, depth=8, hidden=8), replace(IEA, depth=8, hidden=8)], 1)
    turned = {name: t.detach().t() if t.shape == (8, 8) else t.detach() for name, t in call.tensors.items()}
    turned["base 0"] = double(8, 4).t().unsqueeze(1).expand(4, 8, 8)
    check(call.with_tensors(list(turned.values())).requiring(*call.trained), double(8, 4, 8).transpose(0, 1))


SMALL = [replace(VEA, out_norm=True), TEXT_IEA]
NAMES = tuple(make((1,), SMALL, 2).trained)
SOME = [*combinations(NAMES, 1), *list(combinations(NAMES, 2))[::3], *combinations(NAMES, len(NAMES) - 1)]


@pytest.mark.parametrize("needs", SOME, ids=lambda needs: "+".join(needs).replace(" ", "."))
def test_subsets_of_gradients(needs):
    check(make((4,), SMALL, 2).requiring(*needs))


@every_activation
@every_kind
def test_derivatives_of_first_and_second_order(kind, activation):
    sizes = {"hidden": 4, "own": min(KINDS[kind].own, 3), "shared": min(KINDS[kind].shared, 2)}
    spec = replace(KINDS[kind], depth=3, activation=activation, **sizes)
    call = make((2, 2), spec, 1)

    def function(*tensors: Tensor) -> Tensor:
        return reference(call.with_tensors(tensors))

    tensors = list(call.tensors.values())
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_a_large_mean_costs_layer_norm_no_digits():
    call = make(1e3 + randn(40, 24), Spec(24, norm=True))
    exact = results(composed, call.to(torch.float64))
    # the rounding of a mean falls as luck has it; E[x^2] - E[x]^2 would lose all digits
    no_worse_than(results(reference, call), results(composed, call), exact, {2: 2.0, math.inf: 4.0})


@every_activation
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype, kind, activation):
    spec = KINDS[kind]
    sizes = {"hidden": 96 if spec.width == spec.hidden else 24, "own": 12 * spec.own, "shared": 12 * spec.shared}
    call = make((65,), [replace(spec, depth=130, activation=activation, **sizes)] * 2, 1, dtype=dtype)
    no_worse_than(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))
