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

from fastadapt.core.launch import recording
from fastadapt.kernels.side_fusion import config, triton_grad_kernel, triton_kernel, triton_launch
from fastadapt.prove.judge import poisoned
from tests.kernels.side_fusion.calls import (
    ACTIVATIONS, IEA, KINDS, LEA, LINEAR, TEXT_IEA, VEA, Call, Spec, composed, fused, make, randn, results, tower,
)  # fmt: skip
from tests.tolerance import DEEP, error, no_worse_than

triton = fused("triton")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def check(call: Call, grad: Tensor | None = None) -> None:
    """Kernels run, and outputs and gradients are as near to float64's as those of the composition in the same dtype."""
    exact = results(composed, call.to(torch.float64), None if grad is None else grad.double())
    with recording() as launches:
        found = results(triton, call, grad)
    assert launches
    no_worse_than(found, results(composed, call, grad), exact)


def sized(spec: Spec, **sizes: int) -> Spec:
    """The adapter at widths that end in the middle of tiles."""
    own, shared, hidden = 5 * spec.own, 5 * spec.shared, 40 if spec.own + spec.shared == 0 else 17
    return replace(spec, **{"depth": 40, "hidden": hidden, "own": own, "shared": shared} | sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    check(make((19,), sized(KINDS[kind]), 1, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["text expert", "linear with everything"])
def test_16_bits(kind, dtype):
    check(make((19,), sized(KINDS[kind]), 1, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    check(make((5,), [replace(spec, activation=activation) for spec in (IEA, LINEAR)], dtype=torch.float32))


# every structure, widths that differ, and neighbours in the call that are none in a group
MIXED = [
    VEA, replace(IEA, share="both"), replace(TEXT_IEA, depth=9, hidden=3), LINEAR,
    replace(VEA, depth=40, hidden=17, norm_bias=False, activation="gelu"), LEA, replace(IEA, share="both"),
]  # fmt: skip


@pytest.mark.parametrize("out_norm", [False, True], ids=["", "out_norm"])
def test_any_mixture_of_adapters(out_norm):
    check(make((3, 7), [spec for spec in MIXED if out_norm or not spec.out_norm], 3, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_the_towers_of_m2ist_in_tiles_of_their_own(kind):
    """16-bit widths that are multiples of 16, whose tiles are those of a GPU."""
    check(make((20,), tower(kind, 80, 32, 32, layers=1), 2, dtype=torch.bfloat16))


SIZES = {
    "one of each": (1, Spec(1, 1, 1)),
    "tiles exactly": (32, Spec(64, 32, 64)),
    "columns of U end inside a tile": (5, Spec(8, 8, 19, 30)),
    "wider than a tile of fused_kernel": (3, Spec(8, 8, 300)),
    "several runs of rows": (70, Spec(8, 5, 16)),
    "a wide linear tap": (5, Spec(40, 130, 0, out_norm=True)),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size):
    rows, spec = SIZES[size]
    check(make((rows,), spec, dtype=torch.float32))


@pytest.mark.parametrize("specs", [[VEA, TEXT_IEA], [VEA, IEA, LINEAR]], ids=["with LN_out", "without"])
def test_16_bit_tiles_of_many_rows(specs, monkeypatch):
    monkeypatch.setattr(config, "narrow", lambda problem: False)
    monkeypatch.setattr(triton_launch, "processors", lambda device: 0)  # none that few rows would leave idle
    check(make((70,), [sized(spec) for spec in specs], dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", ["vision expert", "text interaction", "linear"])
def test_an_empty_batch(kind):
    found = results(triton, make((3, 0), KINDS[kind], 1, dtype=torch.float32))
    assert found["out"].shape == (3, 0, 8)
    assert all(gradient.count_nonzero() == 0 for name, gradient in found.items() if name != "out")


def test_strided_taps_parameters_bases_and_gradient():
    call = make((3, 7), [replace(LEA, depth=12), replace(IEA, depth=12)], 2, dtype=torch.float32)
    turned = []
    for name, tensor in call.tensors.items():
        twice = randn(*tensor.shape, 2)[..., 0]
        turned.append(twice.copy_(tensor.detach()).requires_grad_(tensor.requires_grad))
    check(call.with_tensors(turned), randn(8, 7, 3).permute(2, 1, 0))
    check(call, randn(1).expand(3, 7, 8))


def test_expanded_and_transposed_taps():
    taps = randn(1, 1, 12).expand(3, 7, 12), randn(7, 3, 12).transpose(0, 1), randn(12, 21).t(), randn(3, 7, 20)[..., 3:15]
    for tap in taps:
        check(make(tap, Spec(12, norm=True), dtype=torch.float32))


NEEDS = {
    "U": (("0 up_weight",), 3),
    "u": (("0 up_bias",), 3),
    "S": (("0 shared_weight",), 3),
    "d": (("0 down_bias",), 4),
    "beta": (("1 norm_bias",), 4),
    "gamma and s": (("1 norm_weight", "0 shared_bias"), 4),
    "D": (("1 down_weight",), 4),
    "a base": (("base 0",), 0),
}


@pytest.mark.parametrize("needs", NEEDS)
def test_only_the_gradients_that_are_wanted(needs):
    """By fewer launches; and what is computed for an adapter's neighbours writes nothing of its own."""
    names, launches = NEEDS[needs]
    call = make((19,), [replace(TEXT_IEA, out_norm=False), VEA, replace(VEA, activation="gelu")], 1, dtype=torch.float32)
    call = call.requiring(*names)
    check(call)
    with recording() as found:
        results(triton, call)
    assert len(found) == 1 + launches


@pytest.mark.parametrize("splits", [1, 3])
def test_partial_sums_of_any_number(splits, monkeypatch):
    monkeypatch.setattr(config, "row_splits", lambda *sizes: splits)
    check(make((70,), [VEA, TEXT_IEA], dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_and_a_float32_base(dtype):
    """The stream stays float32: the sum is added to it unrounded, and its gradient comes back as it is."""
    call = make((19,), [sized(VEA), sized(TEXT_IEA)], [torch.float32, dtype], dtype=dtype, parameter_dtype=torch.float32)
    found, eager = results(triton, call), results(composed, call)
    assert all(found[f"d {name}"].dtype is tensor.dtype for name, tensor in call.trained.items())
    exact = results(composed, call.to(torch.float64))
    assert found["out"].dtype is found["d base 0"].dtype is torch.float32
    no_worse_than(found, eager, exact)


def test_parameters_of_different_dtypes():
    call = make((19,), [sized(VEA), sized(VEA)], dtype=torch.bfloat16)
    for name, tensor in call.tensors.items():
        if name.startswith("1 ") and not name.endswith("tap"):
            call.tensors[name] = tensor.detach().float().requires_grad_()
    found = results(triton, call)
    assert all(found[f"d {name}"].dtype is tensor.dtype for name, tensor in call.trained.items())
    no_worse_than(found, results(composed, call), results(composed, call.to(torch.float64)))


def test_float32_by_tf32s_kernels():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with recording() as launches:
            check(make((19,), sized(VEA), dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert {launch.meta.get("PRECISION", "tf32") for launch in launches} == {"tf32"}


def test_a_large_mean_costs_neither_norm_digits():
    call = make(1e3 + randn(20, 72), sized(LEA, depth=72), dtype=torch.float32)
    call.tensors["0 up_bias"].detach().add_(1e3)
    found, exact = results(triton, call), results(composed, call.to(torch.float64))
    # y itself keeps 1e3 eps of its unit-sized digits; E[y^2] - E[y]^2 would keep a thousandth of those
    assert max(error(found[name], exact[name]) for name in exact) < 3e-3


def test_float16_gradients_of_a_scaled_loss_stay_finite():
    """Products of the gradient with a small scale fit where those without it would not."""
    call = make((19,), replace(sized(VEA), scale=0.01), dtype=torch.float16)
    grad = torch.full((19, 40), 3e4, dtype=torch.float16, device=call.tensors["0 tap"].device)
    exact = results(composed, call.to(torch.float64), grad.double())
    wanted = {name: tensor for name, tensor in exact.items() if tensor.abs().max() < 6e4}
    found = results(triton, call, grad)
    assert {"d 0 down_weight", "d 0 up_weight"} <= wanted.keys()
    assert max(error(found[name], tensor) for name, tensor in wanted.items()) < 1e-2


def test_second_derivatives_are_the_references():
    call = make((5,), [replace(LEA, activation="gelu"), replace(LINEAR, activation="gelu")], dtype=torch.float32)
    wanted = list(call.trained.values())

    def curvature(function) -> tuple[Tensor, ...]:
        slopes = torch.autograd.grad(function(call).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted)

    torch.testing.assert_close(curvature(triton), curvature(composed), **DEEP)


SUMS = ["weight_grad_kernel", "finish_kernel"]
LAUNCHES = {
    "vision": (25600, 256, ["fused_kernel"], ["member_kernel", "hidden_grad_kernel", *SUMS]),
    "text": (1280, 768, ["member_kernel", "combine_kernel"], ["member_kernel", "hidden_grad_kernel", *SUMS]),
}


@pytest.mark.parametrize("kind", LAUNCHES)
def test_a_tower_of_m2ist_is_at_most_two_launches_forward_and_four_backward(kind):
    rows, width, expected, expected_back = LAUNCHES[kind]
    call = make((rows,), tower(kind, width, 128, 256), 2, dtype=torch.bfloat16).to("meta")
    with recording() as forward:
        out = triton(call)
    with recording() as backward:
        torch.autograd.backward(out, torch.empty_like(out))
    assert [launch.name for launch in forward] == expected
    assert [launch.name for launch in backward] == expected_back
    assert len(backward[0].meta["GROUPS"]) == 2


def test_every_kernel_is_among_those_that_run():
    named = {name for module in (triton_kernel, triton_grad_kernel) for name in vars(module) if name.endswith("_kernel")}
    assert {name for *_, forward, backward in LAUNCHES.values() for name in (*forward, *backward)} == named


def test_shapes_that_the_kernels_do_not_take_are_the_librarys():
    wide, many = Spec(4, 300), [Spec(4, 4)] * (config.MOST_ADAPTERS + 1)
    for call in (
        make((9,), wide, dtype=torch.bfloat16),
        make((9,), many, dtype=torch.bfloat16),
        make((4096,), Spec(), dtype=torch.float32),
    ):
        with recording() as launches:
            results(triton, call)
        assert launches == []
