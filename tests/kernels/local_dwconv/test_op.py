"""The public function: what it refuses, what it computes and no more, and how it meets autograd and autocast."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from bench.memory import saved_bytes
from fastadapt import local_dwconv
from fastadapt.core.backend import BackendError
from fastadapt.core.launch import recording
from tests.kernels.local_dwconv.calls import BACKENDS, DEVICE, EVERYTHING, composed, fused, make, results
from tests.tolerance import no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments() -> dict:
    """Good ones on the CPU: two samples of a prefix token and 2 x 3 patches, 6 channels."""
    call = make(2, (2, 3), dtype=torch.float32).to("cpu")
    return {**call.tensors, "grid": (2, 3)}


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


WRONG = {
    "x is a list": ({"x": [1.0]}, "x: expected a floating-point tensor of at least one dimension, got list"),
    "x is 2-D": ({"x": ones(7, 6)}, "x: expected shape (any, 7, any), got shape (7, 6)"),
    "x lacks a token": ({"x": ones(2, 6, 6)}, "x: expected shape (any, 7, any), got shape (2, 6, 6)"),
    "x has no channel": ({"x": ones(2, 7, 0)}, "x: expected at least one channel, got shape (2, 7, 0)"),
    "the grid is a number": ({"grid": 6}, "grid: expected a height and a width, integers of at least 1, got 6"),
    "the grid is 3-D": ({"grid": (1, 2, 3)}, "grid: expected a height and a width, integers of at least 1, got (1, 2, 3)"),
    "the grid is empty": ({"grid": (0, 3)}, "grid: expected a height and a width, integers of at least 1, got (0, 3)"),
    "half a row": ({"grid": (2.0, 3)}, "grid: expected a height and a width, integers of at least 1, got (2.0, 3)"),
    "a negative prefix": ({"prefix_tokens": -1}, "prefix_tokens: expected an integer of at least 0, got -1"),
    "a True prefix": ({"prefix_tokens": True}, "prefix_tokens: expected an integer of at least 0, got True"),
    "no dilation": ({"dilation": 0}, "dilation: expected an integer of at least 1, got 0"),
    "two dilations": ({"dilation": (1, 2)}, "dilation: expected an integer of at least 1, got (1, 2)"),
    "weight is missing": ({"weight": None}, "weight: expected a tensor, got NoneType"),
    "weight is a Conv2d's": ({"weight": ones(6, 1, 3, 3)}, "weight: expected shape (6, any, any), got shape (6, 1, 3, 3)"),
    "weight has channels last": ({"weight": ones(3, 3, 6)}, "weight: expected shape (6, any, any), got shape (3, 3, 6)"),
    "an even kernel": ({"weight": ones(6, 3, 4)}, "weight: expected a kernel of 3, 5 or 7 by 3, 5 or 7, got one of 3 by 4"),
    "a large kernel": ({"weight": ones(6, 9, 3)}, "weight: expected a kernel of 3, 5 or 7 by 3, 5 or 7, got one of 9 by 3"),
    "weight is half": ({"weight": ones(6, 3, 3).half()}, "weight: expected torch.float32, got torch.float16"),
    "weight is elsewhere": ({"weight": torch.ones(6, 3, 3, device="meta")}, "weight: expected a tensor on cpu"),
    "bias is too long": ({"bias": ones(7)}, "bias: expected shape (6), got shape (7,)"),
    "bias is half": ({"bias": ones(6).half()}, "bias: expected torch.float32, got torch.float16"),
    "backend is unknown": ({"backend": "native"}, "backend: expected None or one of reference, triton, got 'native'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        local_dwconv(**arguments() | change)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reasons = "x is on the CPU and TRITON_INTERPRET=1 is not set; x is torch.float64, kernels exist for float32"
    with pytest.raises(BackendError, match=f"^local_dwconv: the triton backend cannot run: {re.escape(reasons)}"):
        fused("triton")(make().to("cpu"))


@pytest.mark.parametrize(("backend", "needs", "adjacent"), [
    ("reference", EVERYTHING, False), ("reference", EVERYTHING, True), ("triton", EVERYTHING, False),
    ("triton", ("weight",), True), ("triton", ("x",), False),
])  # fmt: skip
def test_opcheck(backend, needs, adjacent):
    call = make(2, (2, 3), 4, needs=(), dtype=torch.float32)
    weight = call.weight.permute(1, 2, 0).contiguous().permute(2, 0, 1) if adjacent else call.weight
    tensors = [call.x, weight, call.bias]
    for name, tensor in zip(EVERYTHING, tensors):
        tensor.requires_grad_(name in needs)
    options = (2, 3, 1, 2, backend)
    torch.library.opcheck(torch.ops.fastadapt.local_dwconv.default, (tensors, *options))
    saved = [call.x.detach() if "weight" in needs else None, weight.detach()]
    wanted = [name in needs for name in EVERYTHING]
    grads = [torch.randn_like(call.x)]
    torch.library.opcheck(torch.ops.fastadapt.local_dwconv_backward.default, (saved, grads, wanted, *options))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shapes_and_dtypes(backend, dtype):
    call = make(2, (2, 3), dtype=dtype, parameter_dtype=torch.float32)
    found = results(fused(backend), call)
    assert (found["y"].shape, found["y"].dtype) == (call.x.shape, dtype)
    for name, tensor in call.tensors.items():
        assert (found[f"d {name}"].shape, found[f"d {name}"].dtype) == (tensor.shape, tensor.dtype)


def test_the_defaults_are_one_prefix_token_and_no_dilation_and_no_bias():
    call = make(prefix_tokens=1, dilation=1, bias=False)
    assert torch.equal(local_dwconv(call.x, call.weight, grid=call.grid), fused()(call))


@every_backend
def test_nothing_is_recorded_without_gradients(backend):
    call = make(1, (2, 3), dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call).requires_grad
    assert not fused(backend)(call.requiring()).requires_grad


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(backend, dtype):
    call = make(2, (3, 9), 33, dtype=dtype)
    first, second = (results(fused(backend), call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_over_float32(backend, autocast):
    call = make(2, (4, 5), dtype=torch.float32)
    with torch.autocast(DEVICE.type, autocast):
        ours, eager = results(fused(backend), call), results(composed, call)
    assert ours["y"].dtype == autocast and ours["d x"].dtype == ours["d weight"].dtype == torch.float32
    eager["y"] = eager["y"].to(autocast)  # torch.cat with the float32 prefix has made it float32
    no_worse_than(ours, eager, results(composed, call.to(torch.float64)))


def test_autocast_leaves_float64_alone():
    call = make()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = fused("reference")(call)
    assert torch.equal(y, fused("reference")(call))


X = 3 * (1 + 4 * 5) * 6 * 2  # bytes of x in 16 bits


@pytest.mark.parametrize(
    ("needs", "expected"),
    [(EVERYTHING, X), (("weight",), X), (("x",), 0), (("x", "bias"), 0), ((), 0)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize(("backend", "device"), [("reference", "meta"), ("triton", "meta"), ("triton", DEVICE.type)])
def test_what_is_kept_for_the_backward(needs, expected, backend, device):
    call = make(3, (4, 5), dtype=torch.bfloat16, needs=needs).to(device)
    assert saved_bytes(lambda: fused(backend)(call), exclude=[call.weight, call.bias]) == expected


def test_a_weight_that_is_copied_is_not_kept_twice():
    """The copy with adjacent channels that the kernels read lasts for one launch."""
    call = make(3, (4, 5), dtype=torch.bfloat16).to("meta")
    with recording() as launches:
        size = saved_bytes(lambda: fused("triton")(call))
    assert launches[0].args[1].shape == (3, 3, 6)
    assert size == X + call.weight.numel() * 2
