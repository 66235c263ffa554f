"""The public function: what it refuses, what it computes and no more, and how it meets autograd and autocast."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.memory import saved_bytes
from fastadapt import prior_attention
from fastadapt.core.backend import BackendError
from fastadapt.core.launch import recording, target
from tests.kernels.prior_attention.calls import BACKENDS, DEVICE, EVERYTHING, composed, fused, make, randn, results
from tests.tolerance import error, no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _kernels_for_float32() -> Iterator[None]:
    """Exact float32 has none; interpreted, TF32's are as exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def arguments() -> dict:
    """Good ones on the CPU: 4 queries over 3 keys, 2 heads 8 wide."""
    call = make(2, 4, 3, masked=True, dtype=torch.float32).to("cpu")
    return {**call.tensors, "num_heads": 2, "key_padding_mask": call.mask}


HALF, META = torch.ones(2, 3, 16).half(), torch.ones(2, 3, 16, device="meta")
WRONG = {
    "q is a list": ({"q": [1.0]}, "q: expected a floating-point tensor of at least one dimension, got list"),
    "q is 2-D": ({"q": torch.ones(4, 16)}, "q: expected shape (any, any, any), got shape (4, 16)"),
    "k is missing": ({"k": None}, "k: expected a tensor, got NoneType"),
    "k is narrow": ({"k": torch.ones(2, 3, 8)}, "k: expected shape (2, any, 16), got shape (2, 3, 8)"),
    "k has other samples": ({"k": torch.ones(1, 3, 16)}, "k: expected shape (2, any, 16), got shape (1, 3, 16)"),
    "k is half": ({"k": HALF}, "k: expected torch.float32, got torch.float16"),
    "k is elsewhere": ({"k": META}, "k: expected a tensor on cpu"),
    "v has other keys": ({"v": torch.ones(2, 4, 16)}, "v: expected shape (2, 3, 16), got shape (2, 4, 16)"),
    "v is half": ({"v": HALF}, "v: expected torch.float32, got torch.float16"),
    "v is elsewhere": ({"v": META}, "v: expected a tensor on cpu"),
    "no heads": ({"num_heads": 0}, "num_heads: expected an integer of at least 1, got 0"),
    "half a head": ({"num_heads": 0.5}, "num_heads: expected an integer of at least 1, got 0.5"),
    "True heads": ({"num_heads": True}, "num_heads: expected an integer of at least 1, got True"),
    "unequal heads": ({"num_heads": 3}, "num_heads: expected a divisor of q's width 16, got 3"),
    "the mask is a float": (
        {"key_padding_mask": torch.zeros(2, 3)},
        "key_padding_mask: expected None or a bool tensor, True for a key to ignore, got torch.float32",
    ),
    "the mask is a list": (
        {"key_padding_mask": [True]},
        "key_padding_mask: expected None or a bool tensor, True for a key to ignore, got list",
    ),
    "the mask is of queries": (
        {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
        "key_padding_mask: expected shape (2, 3), got shape (2, 4)",
    ),
    "the mask is elsewhere": (
        {"key_padding_mask": torch.zeros(2, 3, dtype=torch.bool, device="meta")},
        "key_padding_mask: expected a tensor on cpu, where the others are, got one on meta",
    ),
    "scale is infinite": ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    "scale is a string": ({"scale": "1"}, "scale: expected a finite number, got '1'"),
    "backend is unknown": ({"backend": "native"}, "backend: expected None or one of reference, triton, got 'native'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        prior_attention(**arguments() | change)


def test_heads_without_width_are_refused():
    empty = torch.ones(2, 3, 0)
    with pytest.raises(ValueError, match="^num_heads: expected a divisor of q's width 0, got 2$"):
        prior_attention(empty, empty, empty, num_heads=2)


@pytest.mark.parametrize(
    ("change", "arch", "reason"),
    [
        ({"head_width": 4}, 90, "heads are 4 wide, kernels exist for 8, 16, 32, 64"),
        ({"keys": 257}, 90, "there are 257 keys, one pass over heads 8 wide holds 256"),
        ({"keys": 129, "head_width": 32}, 80, "there are 129 keys, one pass over heads 32 wide holds 128"),
        ({"keys": 65, "head_width": 64}, 89, "there are 65 keys, one pass over heads 64 wide holds 64"),
    ],
)
def test_what_the_kernels_cannot_serve_is_said(change, arch, reason):
    call = make(**change, dtype=torch.float32).to("meta")
    with target(arch), pytest.raises(BackendError) as raised:
        fused("triton")(call)
    assert str(raised.value) == f"prior_attention: the triton backend cannot run: {reason}"
    assert fused()(call).shape == call.q.shape


@every_backend
@pytest.mark.parametrize(("needs", "masked"), [(EVERYTHING, True), (("v",), False)], ids=["all", "v alone"])
def test_opcheck(backend, needs, masked):
    call = make(masked=masked, dtype=torch.float32, needs=needs)
    tensors = [*call.tensors.values(), call.mask]
    torch.library.opcheck(torch.ops.fastadapt.prior_attention.default, (tensors, 2, 0.5, backend))
    saved = [None if tensor is None else tensor.detach() for tensor in tensors]
    wanted = [name in needs for name in EVERYTHING] + [False]
    options = (2, 0.5, backend)
    torch.library.opcheck(
        torch.ops.fastadapt.prior_attention_backward.default, (saved, [torch.randn_like(call.q)], wanted, *options)
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shapes_and_dtypes(backend, dtype):
    call = make(masked=True, dtype=dtype)
    found = results(fused(backend), call)
    assert (found["out"].shape, found["out"].dtype) == (call.q.shape, dtype)
    for name, tensor in call.tensors.items():
        assert (found[f"d {name}"].shape, found[f"d {name}"].dtype) == (tensor.shape, dtype)


@pytest.mark.parametrize(
    ("needs", "flags"),
    [(EVERYTHING, (True, True, True)), (("q",), (True, False, False)), (("k", "v"), (False, True, True))],
)
def test_the_kernels_compute_no_gradient_that_is_not_asked_for(needs, flags):
    call = make(32, 197, 77, 12, 64, dtype=torch.bfloat16, needs=needs).to("meta")
    with recording() as launches:
        out = fused("triton")(call)
        torch.autograd.backward(out, torch.empty_like(out))
    assert [launch.name for launch in launches] == ["forward_kernel", "backward_kernel"]
    assert tuple(launches[1].meta[f"NEED_{name}"] for name in "QKV") == flags


def test_partial_sums_of_a_small_batch_take_one_more_launch():
    call = make(1, 1370, 20, 12, 64, dtype=torch.bfloat16).to("meta")
    with recording() as launches:
        out = fused("triton")(call)
        torch.autograd.backward(out, torch.empty_like(out))
    assert [launch.name for launch in launches] == ["forward_kernel", "backward_kernel", "sum_kernel"]


def test_exact_float32_starts_no_kernel():
    torch.set_float32_matmul_precision("highest")
    call = make(dtype=torch.float32)
    with recording() as launches:
        found = results(fused("triton"), call)
    assert launches == []
    expected = results(fused("reference"), call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_backend
def test_nothing_is_recorded_without_gradients(backend):
    call = make(dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call).requires_grad
    assert not fused(backend)(call.requiring()).requires_grad


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(backend, dtype):
    call = make(1, 150, 20, 2, 16, masked=False, dtype=dtype)
    first, second = (results(fused(backend), call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_any_mix_of_dtypes(backend, autocast):
    call = make(2, 33, 20, 2, 16, masked=True, dtype=torch.float32)
    mixed = replace(call, k=call.k.detach().bfloat16().requires_grad_())
    with torch.autocast(DEVICE.type, autocast):
        ours = results(fused(backend), mixed)
        eager = results(lambda call: composed(replace(call, k=call.k.to(autocast))), mixed)
    assert ours["out"].dtype == autocast and ours["d q"].dtype == torch.float32 and ours["d k"].dtype == torch.bfloat16
    eager["out"] = eager["out"].to(autocast)
    no_worse_than(ours, eager, results(composed, mixed.to(torch.float64)))


def test_autocast_leaves_float64_alone():
    call = make()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = fused("reference")(call)
    assert torch.equal(out, fused("reference")(call))


@every_backend
def test_large_scores_do_not_overflow_float16(backend):
    """Products of 160 000, where 65 504 is the largest number, and a scale that makes one key take all of the weight."""
    call = make(1, 20, 5, 1, 16, dtype=torch.float16)
    call = replace(call, q=(100.0 * randn(1, 20, 16)).half(), k=(100.0 * randn(1, 5, 16)).half(), scale=0.25)
    call = call.requiring("v")
    exact = results(composed, call.to(torch.float64))
    for name, found in results(fused(backend), call).items():
        assert error(found, exact[name]) < 2 * torch.finfo(torch.float16).eps, name


WIDTH, QUERIES, KEYS, BATCH = 16, 32, 5, 3
Q, K = BATCH * QUERIES * WIDTH * 2, BATCH * KEYS * WIDTH * 2  # bytes in 16 bits
MASK = BATCH * KEYS


@pytest.mark.parametrize(
    ("needs", "masked", "expected"),
    [
        (EVERYTHING, False, Q + 2 * K),
        (EVERYTHING, True, Q + 2 * K + MASK),
        (("q",), True, Q + 2 * K + MASK),
        (("v",), False, Q + K),
        ((), True, 0),
    ],
)
@pytest.mark.parametrize(("backend", "device"), [("reference", "meta"), ("triton", "meta"), ("triton", DEVICE.type)])
def test_what_is_kept_for_the_backward(needs, masked, expected, backend, device):
    call = make(BATCH, QUERIES, KEYS, 2, WIDTH // 2, masked=masked, dtype=torch.bfloat16, needs=needs).to(device)
    assert saved_bytes(lambda: fused(backend)(call)) == expected


@every_backend
def test_what_a_masked_key_holds_reaches_nothing(backend):
    call = make(masked=True, dtype=torch.bfloat16)
    hidden = call.mask[..., None].expand_as(call.k)
    expected = results(fused(backend), call)
    for value in (torch.nan, torch.inf):
        spoilt = {name: torch.where(hidden, value, getattr(call, name).detach()) for name in ("k", "v")}
        found = results(fused(backend), replace(call, q=call.q.detach(), **spoilt).requiring(*EVERYTHING))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_backend
def test_a_sample_without_a_key_gives_zeros(backend):
    call = make(masked=True, dtype=torch.bfloat16)
    assert call.mask[-1].all() and not call.mask[0].all()
    for name, tensor in results(fused(backend), call).items():
        assert not tensor[-1].any() and tensor[0].any(), name


def test_only_the_reference_runs_where_the_backward_is_differentiated():
    call = make(2, 5, 4, 1, 8, dtype=torch.float32)

    def curvature(function) -> tuple[Tensor, ...]:
        tensors = list(call.tensors.values())
        slopes = torch.autograd.grad(function(call).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), tensors)

    torch.testing.assert_close(curvature(fused("triton")), curvature(composed), rtol=1e-4, atol=1e-4)
