"""The public function: what it refuses, what it computes and no more, and how it meets autograd and autocast."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastadapt import SideTap, native, side_fusion
from fastadapt.core import backend as backends
from fastadapt.core.backend import BackendError
from fastadapt.kernels.side_fusion import op
from fastadapt.prove.judge import poisoned
from tests.kernels.side_fusion.calls import (
    BACKENDS, DEVICE, IEA, KINDS, LEA, LINEAR, TEXT_IEA, VEA, composed, fused, make, randn, results,
)  # fmt: skip
from tests.tolerance import error, no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)
MIXED = [LEA, TEXT_IEA, LINEAR, IEA, replace(VEA, activation="gelu")]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """All memory that a call allocates starts as NaN: an element that nothing writes shows."""
    with poisoned():
        yield


def good() -> dict:
    """An adapter on the CPU: tap (4, 6), h = 5, columns 5 + 3, both norms."""
    return make((4,), replace(TEXT_IEA, norm=True), dtype=torch.float32).to("cpu").adapter(0)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# name -> (what is changed of the second of two good adapters, the beginning of the message)
WRONG = {
    "tap is a list": ({"tap": [1.0]}, "adapters[1].tap: expected a floating-point tensor of at least one dimension, got list"),
    "tap is an integer": ({"tap": ones(4, 6).long()}, "adapters[1].tap: expected a floating-point tensor"),
    "tap has no columns": ({"tap": ones(4, 0)}, "adapters[1].tap: expected at least one column, got shape (4, 0)"),
    "tap has other rows": ({"tap": ones(5, 6)}, "adapters[1].tap: expected shape (4, any), got shape (5, 6)"),
    "tap is half": ({"tap": ones(4, 6).half()}, "adapters[1].tap: expected torch.float32, got torch.float16"),
    "tap is trained": (
        {"tap": ones(4, 6).requires_grad_()},
        "adapters[1].tap: expected a tensor that requires no gradient (detach it: a tap gets none), got one that does",
    ),
    "down_weight is missing": ({"down_weight": None}, "adapters[1].down_weight: expected a tensor, got NoneType"),
    "down_weight is transposed": (
        {"down_weight": ones(6, 5)},
        "adapters[1].down_weight: expected shape (any, 6), got shape (6, 5)",
    ),
    "down_weight is double": (
        {"down_weight": ones(5, 6).double()},
        "adapters[1].down_weight: expected torch.float32, got torch.float64",
    ),
    "no hidden": (
        {"down_weight": ones(0, 6)},
        "adapters[1].down_weight: expected a hidden width of at least 1, got shape (0, 6)",
    ),
    "down_bias is too long": ({"down_bias": ones(6)}, "adapters[1].down_bias: expected shape (5), got shape (6,)"),
    "up_weight has another hidden": (
        {"up_weight": ones(5, 6)},
        "adapters[1].up_weight: expected shape (any, 5), got shape (5, 6)",
    ),
    "up_weight is elsewhere": (
        {"up_weight": torch.ones(5, 5, device="meta")},
        "adapters[1].up_weight: expected a tensor on cpu, where the others are, got one on meta",
    ),
    "shared_weight has no rows": (
        {"shared_weight": ones(0, 5)},
        "adapters[1].shared_weight: expected at least one column of the result, got shape (0, 5)",
    ),
    "up_bias without up_weight": (
        {"up_weight": None},
        "adapters[1].up_weight: expected a tensor where up_bias is given, got None",
    ),
    "an empty up_bias without up_weight": (
        {"up_weight": None, "up_bias": ones(0)},
        "adapters[1].up_weight: expected a tensor where up_bias is given, got None",
    ),
    "shared_weight is half": (
        {"shared_weight": ones(3, 5).half()},
        "adapters[1].shared_weight: expected torch.float32, got torch.float16",
    ),
    "shared_bias is too short": ({"shared_bias": ones(2)}, "adapters[1].shared_bias: expected shape (3), got shape (2,)"),
    "the result is wider": (
        {"up_weight": ones(6, 5), "up_bias": None, "out_norm_weight": None, "out_norm_bias": None},
        "adapters[1]: expected a result of 8 columns, as adapters[0]'s, got 9",
    ),
    "norm_weight is too short": ({"norm_weight": ones(5)}, "adapters[1].norm_weight: expected shape (6), got shape (5,)"),
    "norm_bias without norm_weight": (
        {"norm_weight": None},
        "adapters[1].norm_weight: expected a tensor where norm_bias is given, got None",
    ),
    "norm_bias is half": ({"norm_bias": ones(6).half()}, "adapters[1].norm_bias: expected torch.float32, got torch.float16"),
    "out_norm_weight has the tap's width": (
        {"out_norm_weight": ones(6)},
        "adapters[1].out_norm_weight: expected shape (8), got shape (6,)",
    ),
    "out_norm_bias without out_norm_weight": (
        {"out_norm_weight": None},
        "adapters[1].out_norm_weight: expected a tensor where out_norm_bias is given, got None",
    ),
    "out_norm_bias is half": (
        {"out_norm_bias": ones(8).half()},
        "adapters[1].out_norm_bias: expected torch.float32, got torch.float16",
    ),
    "out_norm_weight is trained": (
        {"out_norm_weight": ones(8).requires_grad_()},
        "adapters[1].out_norm_weight: expected a tensor that requires no gradient, got one that does",
    ),
    "activation is unknown": (
        {"activation": "tanh"},
        "adapters[1].activation: expected one of identity, relu, gelu, quick_gelu, got 'tanh'",
    ),
    "scale is a tensor": ({"scale": ones()}, "adapters[1].scale: expected a finite number, got tensor(1.)"),
    "norm_eps is nan": ({"norm_eps": float("nan")}, "adapters[1].norm_eps: expected a finite number, got nan"),
    "out_norm_eps is text": ({"out_norm_eps": "small"}, "adapters[1].out_norm_eps: expected a finite number, got 'small'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_adapters_are_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        side_fusion([SideTap(**good()), SideTap(**good() | change)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_good_adapters_are_found_good_by_the_quick_look(kind, parameters):
    call = make((4,), KINDS[kind], dtype=torch.bfloat16, parameter_dtype=parameters)
    assert op._plain(SideTap(**call.adapter(0)))


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        ([ones(4, 8), ones(4, 6)], "bases[1]: expected shape (4, 8), got shape (4, 6)"),
        ([ones(4, 8).double()], "bases[0]: expected torch.float32, got torch.float64"),
        ([None], "bases[0]: expected a tensor, got NoneType"),
    ],
)
def test_bad_bases_are_named(bases, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        side_fusion([SideTap(**good())], bases)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="^adapters: expected at least one SideTap, got none"):
        side_fusion([])
    with pytest.raises(ValueError, match="^backend: expected None or one of reference, native, triton, cuda, got 'metal'"):
        side_fusion([SideTap(**good())], backend="metal")


def test_a_tap_is_only_refused_where_a_gradient_could_be_lost():
    call = make((4,), VEA)
    call.tensors["0 tap"].requires_grad_()
    with torch.no_grad():
        out = fused("reference")(call)
    call.tensors["0 tap"].requires_grad_(False)
    assert torch.equal(out, fused("reference")(call))


def test_an_empty_or_plain_sequence_will_do():
    call = make((4,), VEA)
    given = SideTap(**call.adapter(0))
    assert torch.equal(side_fusion((tuple(given),), []), fused()(call))


class TestTheChoice:
    """Which backend runs where none is asked for: a table, of which only the last row is a fallback."""

    @pytest.fixture(autouse=True)
    def _a_gpu(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(backends, "interpreting", lambda: False)
        monkeypatch.setattr(backends, "arch_of", lambda device: 90)
        monkeypatch.setattr(native, "load", lambda: True)
        backends._warn_once.cache_clear()

    @pytest.mark.parametrize(
        ("device", "dtype", "missing", "of_call", "expected"),
        [
            ("cpu", torch.float32, None, [], "native"),
            ("meta", torch.bfloat16, None, [], "reference"),
            ("cuda", torch.bfloat16, None, [], "cuda"),
            ("cuda", torch.float16, None, [], "cuda"),
            ("cuda", torch.float32, None, [], "triton"),
            ("cuda", torch.bfloat16, "not built", [], "triton"),
            ("cuda", torch.bfloat16, None, ["too wide"], "triton"),
        ],
    )
    def test_without_a_wish(self, device, dtype, missing, of_call, expected, monkeypatch: pytest.MonkeyPatch):
        self._cuda(monkeypatch, missing, of_call)
        assert op._choose([self._on(device, dtype)], 0, None) == expected

    def test_float64_on_a_gpu_falls_back_with_a_warning(self, monkeypatch: pytest.MonkeyPatch):
        self._cuda(monkeypatch, None, [])
        with pytest.warns(RuntimeWarning, match="side_fusion: the triton backend cannot run: .*float64"):
            assert op._choose([self._on("cuda", torch.float64)], 0, None) == "reference"

    def test_a_wish_for_cuda_that_cannot_be_met_has_every_reason(self, monkeypatch: pytest.MonkeyPatch):
        self._cuda(monkeypatch, "not built", ["too wide"])
        reasons = "not built; x is on cpu; x is torch.float32, kernels exist for float16 and bfloat16; too wide"
        with pytest.raises(BackendError, match=f"^side_fusion: the cuda backend cannot run: {reasons}$"):
            op._choose([self._on("cpu", torch.float32)], 0, "cuda")

    @staticmethod
    def _cuda(monkeypatch: pytest.MonkeyPatch, missing: str | None, of_call: list[str]) -> None:
        from fastadapt.kernels.side_fusion import cuda_kernel

        monkeypatch.setattr(native, "status", lambda: native.Status(True, None, "", cuda=missing is None))
        monkeypatch.setattr(native, "cuda_reason", lambda: missing)
        monkeypatch.setattr(cuda_kernel, "why_not", lambda tensors, base_count: of_call)

    @staticmethod
    def _on(device: str, dtype: torch.dtype) -> SimpleNamespace:
        """What the choice looks at of a tap, here of one on a device that this machine may not have."""
        return SimpleNamespace(device=torch.device(device), dtype=dtype)


def flat(call) -> tuple[list[Tensor | None], tuple]:
    """The operation's tensors and options, as torch.ops takes them."""
    taps = [SideTap(**call.adapter(i)) for i in range(len(call.adapters))]
    tensors = [*(call.tensors[name] for name in call.bases), *(tensor for tap in taps for tensor in tap[:11])]
    options = [list(column) for column in zip(*((t.activation, t.scale, t.norm_eps, t.out_norm_eps) for t in taps))]
    return tensors, (len(call.bases), *options)


@every_backend
def test_opcheck(backend):
    bases = 1
    tensors, options = flat(make((2, 3), [replace(TEXT_IEA, norm=True), LINEAR], bases, dtype=torch.float32))
    torch.library.opcheck(torch.ops.fastadapt.side_fusion.default, (tensors, *options, backend))
    needs = [t is not None and t.requires_grad and i >= bases for i, t in enumerate(tensors)]
    detached = [None if t is None else t.detach() for t in tensors]
    saved = [None] * bases + detached[bases:]
    arguments = (saved, [randn(2, 3, 8)], needs, *options, backend)
    torch.library.opcheck(torch.ops.fastadapt.side_fusion_backward.default, arguments)


@every_backend
@pytest.mark.parametrize("leading", [(2, 3, 2), (), (3, 0)], ids=str)
def test_shapes_and_dtypes(backend, leading):
    call = make(leading, MIXED, [torch.bfloat16], dtype=torch.bfloat16, parameter_dtype=torch.float32)
    found = results(fused(backend), call)
    assert (found["out"].shape, found["out"].dtype) == ((*leading, 8), torch.bfloat16)
    for name, tensor in call.trained.items():
        assert (found[f"d {name}"].shape, found[f"d {name}"].dtype) == (tensor.shape, tensor.dtype)
        assert leading.count(0) == 0 or name in call.bases or not found[f"d {name}"].any(), name


@every_backend
def test_bases_of_two_dtypes_make_the_wider_one(backend):
    """The stream stays float32; a narrower base's gradient comes back in its dtype."""
    specs = [replace(VEA, own=24, activation="gelu"), replace(LINEAR, hidden=24)]
    call = make((33,), specs, [torch.bfloat16, torch.float32, torch.bfloat16], dtype=torch.bfloat16)
    found, eager = results(fused(backend), call), results(composed, call)
    assert found["out"].dtype == found["d base 1"].dtype == torch.float32 and found["d base 0"].dtype == torch.bfloat16
    no_worse_than(found, eager, results(composed, call.to(torch.float64)))


@every_backend
def test_a_bases_gradient_is_the_results_itself(backend):
    call = make((4,), MIXED, 2, dtype=torch.float32)
    grad = randn(4, 8)
    found = torch.autograd.grad(fused(backend)(call), [call.tensors[name] for name in call.bases], grad)
    assert all(tensor.data_ptr() == grad.data_ptr() for tensor in found)


@every_backend
def test_nothing_is_recorded_without_gradients(backend):
    call = make((4,), MIXED, 1, dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call).requires_grad
    assert not fused(backend)(call.requiring()).requires_grad


@every_backend
def test_an_adapter_without_wanted_gradients_among_others(backend):
    """Nothing of it is kept: its place in what the backward gets is empty."""
    call = make((9,), MIXED, 1, dtype=torch.float32).requiring("0 up_weight", "3 shared_bias", "4 norm_bias", "4 down_weight")
    no_worse_than(results(fused(backend), call), results(composed, call), results(composed, call.to(torch.float64)))


@every_backend
def test_runs_are_bitwise_equal(backend):
    call = make((70,), [replace(spec, depth=24) for spec in (LEA, IEA)], 1, dtype=torch.bfloat16)
    first, second = (results(fused(backend), call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@pytest.mark.parametrize(
    ("autocast", "tap", "base"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, None),
        (torch.bfloat16, torch.float32, None),
    ],
    ids=str,
)
def test_autocast_over_float32_parameters(backend, autocast, tap, base):
    # a relu whose argument is rounded to the other side of zero would tell luck from luck
    sizes = {"depth": 40, "hidden": 16, "activation": "gelu"}
    specs = [replace(spec, own=3 * spec.own, shared=3 * spec.shared, **sizes) for spec in (VEA, TEXT_IEA)]
    call = make((33,), specs, [base] if base else (), dtype=tap, parameter_dtype=torch.float32)
    with torch.autocast(DEVICE.type, autocast):
        ours = results(fused(backend), call)
    assert ours["out"].dtype == (base or autocast) and ours["d 0 down_weight"].dtype == torch.float32
    in_16_bits = [t.to(autocast) if name.endswith("tap") else t for name, t in call.tensors.items()]
    eager = results(composed, call.with_tensors(in_16_bits))
    no_worse_than(ours, eager, results(composed, call.to(torch.float64)), {2: 1.5, math.inf: 2.5})


def test_autocast_leaves_float64_alone():
    call = make((4,), MIXED, 1)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = fused("reference")(call)
    assert torch.equal(out, fused("reference")(call))


@every_backend
def test_a_large_scale_does_not_overflow_float16(backend):
    """Eager multiplies the gradient by the scale in float16: here to 96 000, where 65 504 is the largest number."""
    call = make(1e-3 * randn(64, 64).half(), replace(KINDS["without biases"], depth=64, hidden=8, own=64, scale=32.0))
    call.tensors["0 up_weight"].detach().mul_(1e-2)
    grad = (3000.0 * torch.randint(-1, 2, (64, 64), device=DEVICE)).half()
    assert not results(composed, call, grad)["d 0 up_weight"].isfinite().all()
    exact = results(composed, call.to(torch.float64), grad.double())
    for name, found in results(fused(backend), call, grad).items():
        assert error(found, exact[name]) < 4 * torch.finfo(torch.float16).eps, name
