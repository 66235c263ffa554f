"""The reference, in float64, against a composition of torch functions and against differences."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from bench.memory import saved_bytes
from tests.kernels.bottleneck_adapter.calls import ACTIVATIONS, BACKENDS, Call, as_near_as_eager, composed, fused, make, randn, results
from tests.tolerance import EXACT

reference = fused("reference")
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
KINDS = {
    "plain": {},
    "without biases": {"biases": False, "scale": 0.1},
    "residual": {"residual": True, "scale": 0.1},
    "one scale": {"scale": "shared", "residual": True},
    "a scale for every row": {"scale": "rows"},
    "norm": {"norm": True, "scale": 0.1},
    "norm without bias": {"norm": True, "norm_bias": False, "biases": False, "scale": "rows"},
    "everything": {"norm": True, "scale": "rows", "residual": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def check(call: Call, grad: Tensor | None = None) -> None:
    torch.testing.assert_close(results(reference, call, grad), results(composed, call, grad), **EXACT)


@every_activation
@every_kind
def test_values_and_every_gradient(kind, activation):
    check(make((3, 5, 14), **KINDS[kind], activation=activation))


@every_kind
def test_a_frozen_input(kind):
    """LayerNorm's affine gradients do not come from the input's, which is not computed."""
    found = results(reference, make((9, 14), **KINDS[kind], frozen=True))
    assert "d x" not in found
    check(make((9, 14), **KINDS[kind], frozen=True))


LAYOUTS = {
    "vector": lambda: randn(14, dtype=torch.float64),
    "transposed": lambda: randn(14, 9, dtype=torch.float64).t(),
    "tokens first": lambda: randn(4, 3, 14, dtype=torch.float64).transpose(0, 1),
    "sliced": lambda: randn(6, 5, 50, dtype=torch.float64)[::2, 1:, 3:31:2],
    "expanded": lambda: randn(1, 14, dtype=torch.float64).expand(6, 14),
    "no rows": lambda: randn(0, 14, dtype=torch.float64),
    "no rows in 3-D": lambda: randn(3, 0, 14, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout, kind):
    x = LAYOUTS[layout]()
    call = make(x, **KINDS[kind])
    assert call.tensors["x"].stride() == x.stride()
    check(call)


def test_any_layout_of_the_other_tensors():
    call = make((4, 3, 12), 12, 12, norm=True, scale="rows", residual=True)
    turned = {name: t.detach().transpose(-1, -2) if t.shape == (12, 12) else t.detach() for name, t in call.tensors.items()}
    turned["residual"] = randn(3, 4, 12, dtype=torch.float64).transpose(0, 1)
    turned["scale"] = randn(3, 4, dtype=torch.float64).t()
    check(Call(turned, call.options).requiring(*turned), randn(3, 4, 12, dtype=torch.float64).transpose(0, 1))


NAMES = tuple(make((1, 2), norm=True, scale="rows", residual=True).tensors)


@pytest.mark.parametrize("needs", [*combinations(NAMES, 1), *combinations(NAMES, 2), *combinations(NAMES, 8)], ids="+".join)
@pytest.mark.parametrize("scale", ["shared", "rows"])
def test_every_subset_of_gradients(needs, scale):
    check(make((4, 6), norm=True, scale=scale, residual=True, activation="gelu").requiring(*needs))


@every_activation
@every_kind
def test_derivatives_of_first_and_second_order(kind, activation):
    call = make((2, 2, 5), 3, 4, **KINDS[kind], activation=activation)

    def function(*tensors: Tensor) -> Tensor:
        return reference(call.with_tensors(tensors))

    tensors = list(call.tensors.values())
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_a_large_mean_costs_layer_norm_no_digits():
    x = 1e3 + randn(40, 24)
    call = make(x, norm=True)
    as_near_as_eager(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))


ROWS, DEPTH, HIDDEN, WIDTH = 32, 24, 8, 40
X, Z, STATISTICS = ROWS * DEPTH * 4, ROWS * HIDDEN * 4, 2 * ROWS * 4  # bytes


@pytest.mark.parametrize(
    ("needs", "norm", "expected"),
    [
        (("x", "down_weight", "up_weight", "up_bias", "residual"), False, X + Z),
        (("x", "down_weight", "up_weight", "norm_weight", "norm_bias"), True, X + Z + STATISTICS),
        (("down_weight", "up_weight", "norm_weight", "norm_bias"), True, X + Z + STATISTICS),
        (("x",), False, Z),  # through a frozen adapter
        (("x",), True, X + Z + STATISTICS),
        (("up_weight",), True, Z),
        (("norm_bias", "down_bias", "scale"), True, Z),
        (("up_bias",), True, 0),
        (("residual",), True, 0),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_for_the_backward(needs, norm, expected, backend):
    call = make((ROWS, DEPTH), HIDDEN, WIDTH, norm=norm, scale="shared", residual=True, dtype=torch.float32)
    call = call.requiring(*needs).to("meta")
    parameters = [tensor for name, tensor in call.tensors.items() if name not in ("x", "residual")]
    assert saved_bytes(lambda: fused(backend)(call), exclude=parameters) == expected


@every_activation
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype, kind, activation):
    call = make((65, 130), 24, 96, **KINDS[kind], activation=activation, dtype=dtype)
    as_near_as_eager(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))
