"""The public function: what it refuses, what it computes and no more, and how it meets autograd and autocast."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from fastadapt import bottleneck_adapter
from fastadapt.core.backend import BackendError
from tests.kernels.bottleneck_adapter.calls import BACKENDS, DEVICE, as_near_as_eager, composed, fused, make, randn, results
from tests.tolerance import SLACK, error

every_backend = pytest.mark.parametrize("backend", BACKENDS)
ALL = {"norm": True, "scale": "rows", "residual": True}


def arguments() -> dict:
    """Good ones on the CPU: x (4, 6), h = 5, y (4, 12)."""
    return make((4, 6), **ALL, dtype=torch.float32).to("cpu").tensors


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


WRONG = {
    "x is a list": ({"x": [1.0]}, "x: expected a floating-point tensor of at least one dimension, got list"),
    "x is an integer": ({"x": ones(4, 6).long()}, "x: expected a floating-point tensor"),
    "down_weight is missing": ({"down_weight": None}, "down_weight: expected a tensor, got NoneType"),
    "down_weight is transposed": ({"down_weight": ones(6, 5)}, "down_weight: expected shape (any, 6), got shape (6, 5)"),
    "down_weight is double": ({"down_weight": ones(5, 6).double()}, "down_weight: expected torch.float32, got torch.float64"),
    "no hidden": ({"down_weight": ones(0, 6)}, "down_weight: expected a hidden width of at least 1, got shape (0, 6)"),
    "down_bias is too long": ({"down_bias": ones(6)}, "down_bias: expected shape (5), got shape (6,)"),
    "down_bias is half": ({"down_bias": ones(5).half()}, "down_bias: expected torch.float32, got torch.float16"),
    "up_weight is transposed": ({"up_weight": ones(5, 12)}, "up_weight: expected shape (any, 5), got shape (5, 12)"),
    "up_weight is elsewhere": (
        {"up_weight": torch.ones(12, 5, device="meta")},
        "up_weight: expected a tensor on cpu, where the others are, got one on meta",
    ),
    "up_bias is too short": ({"up_bias": ones(5)}, "up_bias: expected shape (12), got shape (5,)"),
    "norm_weight is too short": ({"norm_weight": ones(5)}, "norm_weight: expected shape (6), got shape (5,)"),
    "norm_bias without norm_weight": ({"norm_weight": None}, "norm_weight: expected a tensor where norm_bias is given, got None"),
    "norm_bias is half": ({"norm_bias": ones(6).half()}, "norm_bias: expected torch.float32, got torch.float16"),
    "norm_eps is nan": ({"norm_eps": float("nan")}, "norm_eps: expected a finite number, got nan"),
    "activation is unknown": ({"activation": "tanh"}, "activation: expected one of relu, gelu, quick_gelu, identity, got 'tanh'"),
    "scale is infinite": ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    "scale has columns": ({"scale": ones(4, 1)}, "scale: expected shape (4), got shape (4, 1)"),
    "scale is an integer tensor": ({"scale": ones(4).long()}, "scale: expected float32, float16, bfloat16 or float64"),
    "residual is too narrow": ({"residual": ones(4, 6)}, "residual: expected shape (4, 12), got shape (4, 6)"),
    "residual is double": ({"residual": ones(4, 12).double()}, "residual: expected torch.float32, got torch.float64"),
    "backend has no adapter": ({"backend": "native"}, "backend: expected None or one of reference, triton, got 'native'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        bottleneck_adapter(**arguments() | change)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reasons = "x is on the CPU and TRITON_INTERPRET=1 is not set; x is torch.float64, kernels exist for float32"
    with pytest.raises(BackendError, match=f"^bottleneck_adapter: the triton backend cannot run: {re.escape(reasons)}"):
        fused("triton")(make((4, 6)).to("cpu"))


@every_backend
@pytest.mark.parametrize("options", [{}, ALL, {"scale": "shared", "norm": True}], ids=["plain", "all", "shared"])
def test_opcheck(options, backend):
    call = make((2, 3, 6), **options, dtype=torch.float32)
    tensors = [call.tensors.get(name) for name in NAMES]
    settings = (0.5, "gelu", 1e-5, backend)
    torch.library.opcheck(torch.ops.fastadapt.bottleneck_adapter.default, (tensors, *settings))
    detached = [None if t is None else t.detach() for t in tensors]
    y, z, *statistics = torch.ops.fastadapt.bottleneck_adapter(detached, *settings)
    saved = [*detached[:8], None, z, *(statistics or [None])]
    needs = [t is not None and name != "residual" for name, t in zip(NAMES, tensors)]
    grads = [torch.randn_like(y), None, *([None] if statistics else [])]
    torch.library.opcheck(torch.ops.fastadapt.bottleneck_adapter_backward.default, (saved, grads, needs, *settings))


NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias", "scale", "residual")


@every_backend
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 2, 6), (6,), (0, 6)], ids=str)
def test_shapes_and_dtypes(backend, shape):
    call = make(shape, **ALL, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    found = results(fused(backend), call)
    assert (found["y"].shape, found["y"].dtype) == ((*shape[:-1], 12), torch.bfloat16)
    for name, tensor in call.tensors.items():
        assert (found[f"d {name}"].shape, found[f"d {name}"].dtype) == (tensor.shape, tensor.dtype)


@every_backend
def test_nothing_is_recorded_without_gradients(backend):
    call = make((4, 6), **ALL, dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call).requires_grad
    assert not fused(backend)(call.requiring()).requires_grad


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(backend, dtype):
    call = make((130, 72), 17, 40, **ALL, dtype=dtype)
    first, second = (results(fused(backend), call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [torch.float32, None], ids=str)
def test_autocast_over_float32_parameters(backend, autocast, residual):
    call = make((33, 136), 16, 96, norm=True, scale="rows", activation="gelu", dtype=torch.float32)
    if residual is not None:
        call.tensors["residual"] = randn(33, 96, dtype=residual).requires_grad_()

    def under_autocast(function) -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, autocast):
            return results(function, call)

    eager, ours = under_autocast(composed), under_autocast(fused(backend))
    assert ours["y"].dtype == (residual or autocast) and ours["d down_weight"].dtype == torch.float32
    if residual is None:
        eager["y"] = eager["y"].to(autocast)  # eager's scale, float32, has made it float32
    # the reference rounds dz^T xhat, of which d norm_weight is a sum, once more than eager does
    slack = {2: 1.5, math.inf: 2.5} if backend == "reference" else SLACK
    as_near_as_eager(ours, eager, results(composed, call.to(torch.float64)), slack)


def test_autocast_leaves_float64_alone():
    call = make((4, 6), **ALL)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = fused("reference")(call)
    assert torch.equal(y, fused("reference")(call))


@every_backend
@pytest.mark.parametrize("kind", ["number", "shared"])
def test_scaled_losses_do_not_overflow_float16(backend, kind):
    """Eager multiplies the gradient by the scale in float16: here to 96 000, where 65 504 is the largest number."""
    call = make(1e-3 * randn(64, 64).half(), 8, 64, scale=32.0 if kind == "number" else "shared", biases=False)
    call.tensors["up_weight"].detach().mul_(1e-2)
    if kind == "shared":
        call.tensors["scale"].detach().fill_(32.0)
        call.tensors["scale"].requires_grad_(False)
    grad = (3000.0 * torch.randint(-1, 2, (64, 64), device=DEVICE)).half()
    assert not results(composed, call, grad)["d up_weight"].isfinite().all()
    exact = results(composed, call.to(torch.float64), grad.double())
    for name, found in results(fused(backend), call, grad).items():
        assert error(found, exact[name]) < 4 * torch.finfo(torch.float16).eps, name
