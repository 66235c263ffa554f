"""The public functions: what they refuse, what is kept, and how they meet autograd, autocast and torch.compile."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.memory import saved_bytes
from fastadapt import local_conv_adapter, local_conv_adapter_path
from fastadapt.core.backend import BackendError
from fastadapt.kernels.local_conv_adapter.reference import Operands
from tests.kernels.local_conv_adapter.calls import BACKENDS, DEVICE, Call, composed, few_bits, fused, make, results
from tests.tolerance import no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


WRONG = {
    "x is a list": ({"x": [1.0]}, "x: expected a floating-point tensor of at least one dimension, got list"),
    "x lacks a token": ({"x": ones(2, 12, 12)}, "x: expected shape (any, 13, any), got shape (2, 12, 12)"),
    "the grid is a number": ({"grid": 6}, "grid: expected a height and a width, integers of at least 1, got 6"),
    "half a row": ({"grid": (2.0, 3)}, "grid: expected a height and a width, integers of at least 1, got (2.0, 3)"),
    "a negative prefix": ({"prefix_tokens": -1}, "prefix_tokens: expected an integer of at least 0, got -1"),
    "no dilation": ({"dilation": 0}, "dilation: expected an integer of at least 1, got 0"),
    "another activation": ({"activation": "tanh"}, "activation: expected one of relu, gelu, quick_gelu, identity, got 'tanh'"),
    "no hidden": ({"down_weight": ones(0, 12)}, "down_weight: expected a hidden width of at least 1, got shape (0, 12)"),
    "down_weight is narrow": ({"down_weight": ones(5, 11)}, "down_weight: expected shape (any, 12), got shape (5, 11)"),
    "down_weight is half": ({"down_weight": ones(5, 12).half()}, "down_weight: expected torch.float32, got torch.float16"),
    "down_bias is long": ({"down_bias": ones(6)}, "down_bias: expected shape (5), got shape (6,)"),
    "weight is a Conv2d's": ({"weight": ones(5, 1, 3, 3)}, "weight: expected shape (5, any, any), got shape (5, 1, 3, 3)"),
    "an even kernel": ({"weight": ones(5, 3, 4)}, "weight: expected a kernel of 3, 5 or 7 by 3, 5 or 7, got one of 3 by 4"),
    "weight is half": ({"weight": ones(5, 3, 3).half()}, "weight: expected torch.float32, got torch.float16"),
    "conv_bias is long": ({"conv_bias": ones(6)}, "conv_bias: expected shape (5), got shape (6,)"),
    "up_weight is turned": ({"up_weight": ones(5, 10)}, "up_weight: expected shape (any, 5), got shape (5, 10)"),
    "up_bias is elsewhere": ({"up_bias": torch.ones(10, device="meta")}, "up_bias: expected a tensor on cpu"),
    "scale is infinite": ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    "scale is a row": ({"scale": ones(13)}, "scale: expected shape (2, 13), got shape (13,)"),
    "residual is narrow": ({"residual": ones(2, 13, 9)}, "residual: expected shape (2, 13, 10), got shape (2, 13, 9)"),
    "residual is half": ({"residual": ones(2, 13, 10).half()}, "residual: expected torch.float32, got torch.float16"),
    "backend is unknown": ({"backend": "native"}, "backend: expected None or one of reference, triton, got 'native'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    call, (change, message) = make(dtype=torch.float32).to("cpu"), WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        local_conv_adapter(**call.tensors | call.options | change)


def test_a_backend_that_cannot_run_says_why():
    reason = "local_conv_adapter: the triton backend cannot run: x is torch.float64, kernels exist for float32"
    with pytest.raises(BackendError, match=f"^{re.escape(reason)}"):
        fused("triton")(make())


@pytest.mark.parametrize(("backend", "scale"), [("reference", "rows"), ("triton", "shared")])
def test_opcheck(backend, scale):
    call = make(1, (1, 2), 3, 2, 3, scale=scale, residual=True, dtype=torch.bfloat16)
    tensors = list(Operands(**call.tensors))
    options = (1, 2, 1, 1, 0.5, "gelu", backend)
    torch.library.opcheck(torch.ops.fastadapt.local_conv_adapter.default, (tensors, *options))
    hidden = torch.randn(1, 3, 2, dtype=torch.bfloat16, device=DEVICE)
    saved = [*(tensor.detach() for tensor in tensors[:8]), None, hidden]
    grads, needs = [torch.randn_like(call.tensors["residual"]), None], [True] * 8 + [False]
    torch.library.opcheck(torch.ops.fastadapt.local_conv_adapter_backward.default, (saved, grads, needs, *options))


@every_backend
def test_compiled_and_checkpointed_it_is_the_same(backend):
    call = make(1, (2, 3), scale="rows", residual=True, dtype=torch.bfloat16)
    expected = results(fused(backend), call)

    def again(call: Call) -> Tensor:
        run = lambda *tensors: fused(backend)(call.with_tensors(tensors))  # noqa: E731
        return checkpoint(run, *call.tensors.values(), use_reentrant=False)

    for function in (torch.compile(fused(backend), fullgraph=True, backend="aot_eager"), again):
        found = results(function, call)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@every_backend
def test_autocast(backend):
    call = make(2, (5, 9), 48, 64, 48, scale=0.5, residual=True, dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours, eager = results(fused(backend), call), results(composed, call)
    assert ours["y"].dtype is torch.float32  # the residual's
    no_worse_than(ours, eager, results(composed, call.to(torch.float64)))


@every_backend
def test_the_input_and_one_hidden_are_kept(backend):
    call = make(2, (3, 4), 24, 16, 24, scale=0.5, residual=True, dtype=torch.bfloat16)
    x, *parameters = call.tensors.values()
    assert saved_bytes(lambda: fused(backend)(call), exclude=parameters[:-1]) == 2 * 26 * (24 + 16)
    call.requiring("residual", "up_bias")
    assert saved_bytes(lambda: fused(backend)(call), exclude=parameters[:-1]) == 0


def test_the_residuals_gradient_is_that_of_the_result_itself():
    call = make(residual=True).requiring("residual")
    y = fused()(call)
    grad = few_bits(y)
    (found,) = torch.autograd.grad(y, call.tensors["residual"], grad)
    assert found.data_ptr() == grad.data_ptr()


def path(**changes: object) -> str:
    common = {"grid": (37, 37), "kernel": (3, 3), "dilation": 1, "gradients": False, "backend": "triton"}
    sizes = {"rows": 32 * 1370, "in_features": 768, "hidden": 64, "out_features": 768}
    return local_conv_adapter_path(
        **sizes | common | {"dtype": torch.bfloat16, "device": torch.device("meta")} | changes  # type: ignore[arg-type]
    )


def test_the_path_is_fused_where_that_pays():
    assert path() == path(hidden=256) == path(kernel=(7, 7)) == path(rows=197, grid=(14, 14)) == "fused"
    parts = {"gradients": True}, {"backend": "reference"}, {"hidden": 257}, {"dtype": torch.float32}, {"dilation": 12}
    assert {path(**change) for change in parts} == {"parts"}
    assert path(device=torch.device("cpu"), backend=None) == "parts"
    with pytest.raises(ValueError, match="grid: expected .* got 6"):
        path(grid=6)
