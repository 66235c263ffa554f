"""Which implementation runs, and what is said when the one asked for cannot."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from fastadapt import native
from fastadapt.core import backend
from fastadapt.core.backend import BackendError, autocast_dtype, choose, why_not_triton


@pytest.fixture(autouse=True)
def _plain_process(monkeypatch: pytest.MonkeyPatch):
    """Kernels compiled, triton and the C++ library installed, a Hopper GPU, not strict, and no warning given yet."""
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)
    monkeypatch.setattr(backend, "arch_of", lambda device: 90)
    monkeypatch.setattr(native, "load", lambda: True)
    monkeypatch.delenv("FASTADAPT_STRICT", raising=False)
    backend._warn_once.cache_clear()


def on(device: str, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    """What `choose` looks at of a tensor, here of one on a device that this machine may not have."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_the_choice_without_a_wish():
    assert choose("op", None, on("cuda")) == "triton"
    assert choose("op", None, on("cpu")) == "native"
    assert choose("op", None, on("meta")) == "reference"


def test_a_cpu_without_the_cpp_library_takes_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "load", lambda: False)
    assert choose("op", None, on("cpu")) == "reference"
    with pytest.raises(BackendError, match="native backend cannot run: the C\\+\\+ library is not built"):
        choose("op", "native", on("cpu"))


def test_the_cpp_kernels_are_for_the_cpu():
    with pytest.raises(BackendError, match="native backend cannot run: x is on cuda"):
        choose("op", "native", on("cuda"))


def test_a_wish_that_can_be_met_is():
    for device in ("cuda", "cpu", "meta"):
        assert choose("op", "reference", on(device)) == "reference"
    assert choose("op", "triton", on("cuda")) == choose("op", "triton", on("meta")) == "triton"


def test_an_unknown_backend_is_a_bad_argument():
    with pytest.raises(ValueError, match="^backend: expected None or one of reference, native, triton, got 'cuda'$"):
        choose("op", "cuda", on("cpu"))


@pytest.mark.parametrize(
    ("device", "dtype", "state", "reasons"),
    [
        ("cuda", torch.float32, {}, []),
        ("cpu", torch.float32, {"interpreting": lambda: True}, []),
        ("cpu", torch.float32, {}, ["x is on the CPU and TRITON_INTERPRET=1 is not set"]),
        ("xpu", torch.float32, {}, ["x is on xpu"]),
        (
            "cuda",
            torch.float32,
            {"arch_of": lambda device: 75},
            ["the GPU has compute capability 7.5, at least 8.0 is needed"],
        ),
        (
            "cuda",
            torch.float64,
            {"_triton_installed": lambda: False},
            ["triton is not installed", "x is torch.float64, kernels exist for float32, float16 and bfloat16"],
        ),
    ],
)
def test_every_reason_is_given(device, dtype, state, reasons, monkeypatch: pytest.MonkeyPatch):
    for name, value in state.items():
        monkeypatch.setattr(backend, name, value)
    assert why_not_triton(torch.device(device), dtype) == reasons
    if reasons:
        with pytest.raises(BackendError) as raised:
            choose("op", "triton", on(device, dtype))
        assert str(raised.value) == f"op: the triton backend cannot run: {'; '.join(reasons)}"


class TestReasonsOfTheCall:
    """Why Triton cannot run this call, whatever its device and dtype."""

    def test_come_after_those_of_the_device(self):
        with pytest.raises(BackendError, match="cannot run: x is on the CPU and .*; too wide; too long$"):
            choose("op", "triton", on("cpu"), reasons=["too wide", "too long"])

    def test_make_an_automatic_choice_fall_back(self):
        with pytest.warns(RuntimeWarning, match="op: the triton backend cannot run: too wide. The reference runs instead"):
            assert choose("op", None, on("cuda"), reasons=["too wide"]) == "reference"

    def test_raise_in_strict_mode(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FASTADAPT_STRICT", "1")
        with pytest.raises(BackendError, match="cannot run: too wide$"):
            choose("op", None, on("cuda"), reasons=["too wide"])

    @pytest.mark.parametrize(("requested", "device"), [("reference", "cuda"), ("native", "cpu"), (None, "cpu")])
    def test_say_nothing_of_other_backends(self, requested, device):
        assert choose("op", requested, on(device), reasons=["too wide"]) == (requested or "native")


def test_falling_back_on_a_gpu_warns_once():
    with pytest.warns(RuntimeWarning, match="op: .*float64, kernels exist .* The reference runs instead"):
        assert choose("op", None, on("cuda", torch.float64)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", None, on("cuda", torch.float64)) == "reference"
    with pytest.warns(RuntimeWarning, match="other: "):
        choose("other", None, on("cuda", torch.float64))


def test_strict_mode_does_not_fall_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTADAPT_STRICT", "1")
    with pytest.raises(BackendError, match="float64, kernels exist"):
        choose("op", None, on("cuda", torch.float64))
    assert choose("op", None, on("cuda")) == "triton"
    assert choose("op", None, on("cpu", torch.float64)) == "native"  # nothing to fall back from


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast(dtype, device):
    x = torch.zeros(1, device=device)
    assert autocast_dtype(x) is None
    with torch.autocast("cpu", dtype):
        assert autocast_dtype(x) is dtype
        assert autocast_dtype(x.double()) is None
    with torch.autocast("cpu", dtype, enabled=False):
        assert autocast_dtype(x) is None
