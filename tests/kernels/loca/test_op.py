"""The public function: what it refuses, what it computes and no more, and how it meets autograd, autocast and compilers."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt import loca
from fastadapt.core.backend import BackendError
from tests.kernels.loca.calls import (
    BACKENDS,
    DEVICE,
    RUNNING,
    STAGES,
    Call,
    Function,
    composed,
    few_bits,
    fused,
    make,
    pooled,
    results,
    with_moments,
)
from tests.tolerance import no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# of make(site=True): n (2, 16, 10), convolutions of 8, 3 and 4 channels
WRONG = {
    "n is a list": ({"n": [1.0]}, "n: expected a tensor of three dimensions, got list"),
    "n is flat": ({"n": ones(16, 10)}, "n: expected a tensor of three dimensions, got shape (16, 10)"),
    "n is an integer": ({"n": ones(2, 16, 10).long()}, "n: expected float32, float16, bfloat16 or float64"),
    "down_weight is transposed": ({"down_weight": ones(10, 12)}, "down_weight: expected shape (any, 10), got shape (10, 12)"),
    "down_weight is double": ({"down_weight": ones(12, 10).double()}, "down_weight: expected torch.float32, got torch.float64"),
    "down_bias is too long": ({"down_bias": ones(13)}, "down_bias: expected shape (12), got shape (13,)"),
    "A is a matrix": ({"point.weight": ones(8, 12)}, "point.weight: expected shape (any, 12, 1, 1), got shape (8, 12)"),
    "A has all": ({"point.weight": ones(12, 12, 1, 1)}, "point.weight: expected 1 to 11 channels of the 12 of down_weight"),
    "R has nothing": ({"reduce.weight": ones(0, 12, 1, 1)}, "reduce.weight: expected at least one channel, got 0"),
    "R is half": ({"reduce.weight": ones(3, 12, 1, 1).half()}, "reduce.weight: expected torch.float32, got torch.float16"),
    "K has other channels": ({"local.weight": ones(5, 3, 3, 3)}, "local.weight: expected shape (4, 3, 3, 3), got"),
    "K is 5x5": ({"local.weight": ones(4, 3, 5, 5)}, "local.weight: expected shape (4, 3, 3, 3), got"),
    "a bias is missing": ({"reduce.bias": None}, "reduce.bias: expected a tensor, got NoneType"),
    "a norm is too narrow": ({"local.norm_weight": ones(3)}, "local.norm_weight: expected shape (4), got shape (3,)"),
    "a mean alone": (
        {"local.running_mean": ones(4)},
        "local.running_mean: expected None where point.running_mean is None, got a tensor",
    ),
    "one norm in eval": ({"point.running_mean": ones(8)}, "point.running_var: expected a tensor, got NoneType"),
    "up_weight is transposed": ({"up_weight": ones(12, 11)}, "up_weight: expected shape (any, 12), got shape (12, 11)"),
    "up_weight is elsewhere": (
        {"up_weight": ones(10, 12).to("meta")},
        "up_weight: expected a tensor on cpu, where the others are, got one on meta",
    ),
    "up_bias is half": ({"up_bias": ones(10).half()}, "up_bias: expected torch.float32, got torch.float16"),
    "mlp is missing": ({"mlp": None}, "mlp: expected a tensor, got NoneType"),
    "mlp is double": ({"mlp": ones(2, 16, 10).double()}, "mlp: expected torch.float32, got torch.float64"),
    "residual is narrow": ({"residual": ones(2, 16, 9)}, "residual: expected shape (2, 16, 10), got shape (2, 16, 9)"),
    "layer_scale trains": (
        {"layer_scale": ones(10).requires_grad_()},
        "layer_scale: expected a tensor that requires no gradient, got one that does",
    ),
    "the grid is another": ({"grid": (3, 4)}, "grid: expected (H, W) with H W = 15, the patches of n, got (3, 4)"),
    "the patches are no square": ({"grid": None}, "n: expected one row for the class token and a square number of rows"),
    "eps is a string": ({"eps": "1"}, "eps: expected a finite number, got '1'"),
    "scale is infinite": ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    "backend is unknown": ({"backend": "native"}, "backend: expected None or one of reference, triton, got 'native'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    change, message = WRONG[case]
    call = make(site=True, dtype=torch.float32).to("cpu")
    given = {name: tensor.detach() for name, tensor in call.tensors.items()} | {"grid": (3, 5), "scale": 0.2} | change
    roles = ("weight", "bias", "norm_weight", "norm_bias", *RUNNING)
    stages = {stage: [given.pop(f"{stage}.{role}", None) for role in roles] for stage in STAGES}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        loca(**given, **stages)


def test_a_scale_without_a_residual_and_a_single_patch_are_refused():
    call = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="^scale: expected 1 without a residual, got 0.5"):
        with_moments(Call(call.tensors, call.grid, scale=0.5))
    with pytest.raises(ValueError, match="^n: expected at least two patches where statistics are the batch's"):
        with_moments(make(1, (1, 1)))
    assert with_moments(make(1, (1, 1), training=False))[0].shape == (1, 2, 10)


def test_a_square_grid_needs_no_mention():
    call = make(grid=(3, 3))
    expected = fused()(call)
    assert torch.equal(fused()(Call(call.tensors, None)), expected)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reasons = "x is on the CPU and TRITON_INTERPRET=1 is not set; x is torch.float64, kernels exist for float32"
    with pytest.raises(BackendError, match=f"^loca: the triton backend cannot run: {re.escape(reasons)}"):
        fused("triton")(make().to("cpu"))


@every_backend
@pytest.mark.parametrize(("training", "site"), [(True, True), (False, False)])
def test_opcheck(training, site, backend):
    call = make(training=training, site=site, dtype=torch.float32)
    roles = [(stage, role) for stage in STAGES for role in ("weight", "bias", "norm_weight", "norm_bias")]
    names = ["n", "down_weight", "down_bias", *(f"{stage}.{role}" for stage, role in roles), "up_weight", "up_bias"]
    names += [*(f"{stage}.{role}" for stage in STAGES for role in RUNNING), "layer_scale", "mlp", "residual"]
    tensors = [call.tensors.get(name) for name in names]
    options = (*call.grid, call.eps, call.scale, backend)
    torch.library.opcheck(torch.ops.fastadapt.loca.default, (tensors, *options))
    detached = [None if t is None else t.detach() for t in tensors]
    out, statistics, *moments = torch.ops.fastadapt.loca(detached, *options)
    saved = [*detached[:-2], None, None, statistics]
    needs = [t is not None and t.requires_grad and name != "residual" for name, t in zip(names, tensors)]
    grads = [torch.randn_like(out), None, *(None for _ in moments)]
    torch.library.opcheck(torch.ops.fastadapt.loca_backward.default, (saved, grads, needs, *options))


@every_backend
@every_mode
def test_nothing_is_recorded_without_gradients(training, backend):
    call = make(training=training, dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call).requires_grad
    assert not fused(backend)(call.requiring()).requires_grad


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(backend, dtype):
    call = make(3, (9, 8), 40, (16, 8, 16), 40, site=True, dtype=dtype)
    first, second = (results(fused(backend), call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@every_mode
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_over_float32_parameters(autocast, training, backend):
    call = make(4, (9, 8), 64, (32, 8, 16), 64, training=training, site=True, clear=True, dtype=torch.float32)
    call.tensors["mlp"] = call.tensors["mlp"].detach().to(autocast).requires_grad_()

    def under_autocast(function: Function, call: Call) -> Tensor:
        with torch.autocast(DEVICE.type, autocast):
            return function(call)

    found = results(partial(under_autocast, fused(backend)), call)
    assert all(tensor.dtype is (autocast if name == "d mlp" else torch.float32) for name, tensor in found.items())
    eager, exact = results(partial(under_autocast, composed), call), results(composed, call.to(torch.float64))
    # several gradients are of eight numbers, whose errors fall as luck has it
    no_worse_than(*(pooled(one, exact, call) for one in (found, eager, exact)), slack={2: 1.5, math.inf: 3.0})


def test_autocast_leaves_float64_alone():
    call = make()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = fused("reference")(call)
    assert torch.equal(out, fused("reference")(call))


@every_backend
@every_mode
def test_compiled_is_eager_bit_for_bit(training, backend):
    call = make(training=training, site=True, dtype=torch.float32)
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, call), results(fused(backend), call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, backend):
    call = make(site=True, dtype=torch.float32)
    expected = results(fused(backend), call)

    def run(*tensors: Tensor) -> Tensor:
        return fused(backend)(call.with_tensors(tensors))

    out = checkpoint(run, *call.tensors.values(), use_reentrant=use_reentrant)
    out.backward(few_bits(out))
    for name, tensor in call.tensors.items():
        assert tensor.grad is None if not tensor.requires_grad else torch.equal(tensor.grad, expected[f"d {name}"]), name
