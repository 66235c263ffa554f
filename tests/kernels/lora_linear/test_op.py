"""The public functions: what they refuse, what they compute and no more, and how they meet autograd and autocast."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt import lora_linear, lora_linear_group
from fastadapt.core import philox
from fastadapt.core.backend import BackendError
from fastadapt.core.launch import recording
from tests.kernels.lora_linear.calls import (
    BACKENDS,
    DEVICE,
    EVERYTHING,
    SEED,
    Call,
    composed,
    fused,
    make,
    randn,
    results,
)
from tests.tolerance import error, no_worse_than

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def arguments() -> dict:
    """Good ones on the CPU, x (4, 6) and weight (5, 6)."""
    call = make((4, 6), (5,), (3,), dtype=torch.float32).to("cpu")
    return {"x": call.x, **call.members[0]._asdict(), "scale": 2.0, "dropout_p": 0.1}


WRONG = {
    "x is a list": ({"x": [1.0]}, "x: expected a floating-point tensor of at least one dimension, got list"),
    "x is an integer": ({"x": torch.ones(4, 6, dtype=torch.int64)}, "x: expected a floating-point tensor"),
    "x is a scalar": ({"x": torch.ones(())}, "x: expected a floating-point tensor of at least one dimension, got"),
    "weight is missing": ({"weight": None}, "weight: expected a tensor, got NoneType"),
    "weight is 1-D": ({"weight": torch.ones(6)}, "weight: expected shape (any, 6), got shape (6,)"),
    "weight is transposed": ({"weight": torch.ones(6, 5)}, "weight: expected shape (any, 6), got shape (6, 5)"),
    "weight is double": (
        {"weight": torch.ones(5, 6).double()},
        "weight: expected torch.float32, got torch.float64",
    ),
    "weight is elsewhere": (
        {"weight": torch.ones(5, 6, device="meta")},
        "weight: expected a tensor on cpu, where the others are, got one on meta",
    ),
    "bias is too long": ({"bias": torch.ones(6)}, "bias: expected shape (5), got shape (6,)"),
    "bias is half": ({"bias": torch.ones(5).half()}, "bias: expected torch.float32, got torch.float16"),
    "bias is elsewhere": ({"bias": torch.ones(5, device="meta")}, "bias: expected a tensor on cpu"),
    "lora_a is too wide": ({"lora_a": torch.ones(3, 7)}, "lora_a: expected shape (any, 6), got shape (3, 7)"),
    "lora_a is double": ({"lora_a": torch.ones(3, 6).double()}, "lora_a: expected torch.float32, got torch.float64"),
    "lora_a is half": ({"lora_a": torch.ones(3, 6).half()}, "lora_a: expected torch.float32, got torch.float16"),
    "rank 0": (
        {"lora_a": torch.ones(0, 6), "lora_b": torch.ones(5, 0)},
        "lora_a: expected a rank of at least 1, got shape (0, 6)",
    ),
    "lora_b is transposed": ({"lora_b": torch.ones(3, 5)}, "lora_b: expected shape (5, 3), got shape (3, 5)"),
    "lora_b has another rank": ({"lora_b": torch.ones(5, 2)}, "lora_b: expected shape (5, 3), got shape (5, 2)"),
    "lora_b is half": ({"lora_b": torch.ones(5, 3).half()}, "lora_b: expected torch.float32, got torch.float16"),
    "lora_b is elsewhere": ({"lora_b": torch.ones(5, 3, device="meta")}, "lora_b: expected a tensor on cpu"),
    "scale is nan": ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    "scale is infinite": ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    "scale is a string": ({"scale": "2"}, "scale: expected a finite number, got '2'"),
    "scale is True": ({"scale": True}, "scale: expected a finite number, got True"),
    "dropout is negative": ({"dropout_p": -0.1}, "dropout_p: expected a number p with 0 <= p < 1, got -0.1"),
    "dropout is 1": ({"dropout_p": 1.0}, "dropout_p: expected a number p with 0 <= p < 1, got 1.0"),
    "dropout is nan": ({"dropout_p": float("nan")}, "dropout_p: expected a number p with 0 <= p < 1, got nan"),
    "backend is unknown": ({"backend": "cuda"}, "backend: expected None or one of reference,"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_named(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        lora_linear(**arguments() | change)


@pytest.mark.parametrize(
    ("adapters", "x", "message"),
    [
        (torch.bfloat16, torch.float16, "lora_a: expected torch.float16 or torch.float32, got torch.bfloat16"),
        (torch.float64, torch.bfloat16, "lora_a: expected torch.bfloat16 or torch.float32, got torch.float64"),
    ],
)
def test_adapters_are_xs_dtype_or_float32(adapters, x, message):
    call = make((4, 6), dtype=x, adapter_dtype=adapters)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fused()(call)


class TestGroups:
    @pytest.mark.parametrize("name", ["biases", "lora_as", "lora_bs", "scales"])
    def test_of_unequal_lengths(self, name):
        call = make((4, 6), (5, 5), (3, 3))
        lists = dict(zip(("weights", "biases", "lora_as", "lora_bs"), zip(*call.members)), scales=call.scales)
        with pytest.raises(ValueError, match=f"^{name}: expected 2 entries, one a member, got 1$"):
            lora_linear_group(call.x, **lists | {name: lists[name][:1]})

    def test_of_none(self):
        with pytest.raises(ValueError, match="^weights: expected 1 entries, one a member, got 0$"):
            lora_linear_group(torch.ones(4, 6), [], [], [], [], scales=[])

    def test_the_bad_members_index_is_named(self):
        call = make((4, 6), (5, 5), (3, 3))
        bad = call.members[1]._replace(lora_b=torch.ones(5, 2).double())
        with pytest.raises(ValueError, match=r"^lora_bs\[1\]: expected shape \(5, 3\), got shape \(5, 2\)$"):
            fused()(replace(call, members=(call.members[0], bad)))

    def test_of_one_is_lora_linear(self):
        call = make((4, 6), dropout_p=0.3)
        torch.manual_seed(SEED)
        (alone,) = fused()(call)
        torch.manual_seed(SEED)
        fields = [[tensor] for tensor in call.members[0]]
        (grouped,) = lora_linear_group(call.x, *fields, scales=call.scales, dropout_p=0.3)
        assert torch.equal(alone, grouped)


class TestBackends:
    def test_one_that_cannot_run_says_why(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        reasons = "x is on the CPU and TRITON_INTERPRET=1 is not set; x is torch.float64, kernels exist for float32"
        with pytest.raises(BackendError, match=f"^lora_linear: the triton backend cannot run: {re.escape(reasons)}"):
            fused("triton")(make((4, 6)).to("cpu"))

    def test_strict_mode_has_nothing_against_a_cpu(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FASTADAPT_STRICT", "1")
        fused()(make((4, 6)).to("cpu"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_meta_tensors_run_the_kernels_that_a_gpu_would(self, dtype):
        call = make((4, 6), (5, 7), (3, 2), dropout_p=0.1, dtype=dtype).to("meta")
        with recording() as launches:
            found = results(fused("triton"), call)
        assert [found[f"y[{g}]"].shape for g in (0, 1)] == [(4, 5), (4, 7)]
        assert "factor_grads_kernel" in {launch.name for launch in launches}


@every_backend
def test_opcheck_of_the_forward(backend):
    call = make((4, 3, 6), (5, 7), (3, 2), (True, False), dropout_p=0.1, dtype=torch.float32, needs=EVERYTHING)
    flat = [tensor for member in call.members for tensor in member]
    tensors = [call.x, philox.draw_seed(call.x.device), *flat]
    torch.library.opcheck(torch.ops.fastadapt.lora_linear.default, (tensors, [0.5, 2.0], 0.1, backend))


@every_backend
@pytest.mark.parametrize("needs", [EVERYTHING, ("lora_a", "lora_b")], ids="+".join)
def test_opcheck_of_the_backward(backend, needs):
    call = make((4, 3, 6), (5, 7), (3, 2), (True, False), dropout_p=0.1, dtype=torch.float32, needs=needs)
    flat = [tensor for member in call.members for tensor in member]
    tensors = [call.x.detach(), philox.draw_seed(call.x.device), *(t if t is None else t.detach() for t in flat)]
    outputs = torch.ops.fastadapt.lora_linear(tensors, [0.5, 2.0], 0.1, backend)
    saved = [*tensors, *outputs[2:]]
    wanted = [call.x.requires_grad, False, *(t is not None and t.requires_grad for t in flat)]
    grads = [torch.randn_like(output) for output in outputs[:2]] + [None, None]
    torch.library.opcheck(
        torch.ops.fastadapt.lora_linear_backward.default, (saved, grads, wanted, [0.5, 2.0], 0.1, backend)
    )


@every_backend
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 2, 6), (6,), (0, 6)], ids=str)
def test_shapes_and_dtypes(backend, shape):
    call = make(shape, dtype=torch.bfloat16, adapter_dtype=torch.float32, needs=EVERYTHING)
    found = results(fused(backend), call)
    assert (found["y[0]"].shape, found["y[0]"].dtype) == ((*shape[:-1], 40), torch.bfloat16)
    for name, tensor in call.tensors.items():
        assert (found[f"d {name}"].shape, found[f"d {name}"].dtype) == (tensor.shape, tensor.dtype)


class Products(TorchDispatchMode):
    """The shapes of the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.shapes.add(tuple(result.shape))
        return result


ROWS, DEPTH, WIDTH, RANK = 11, 7, 5, 3
LOW, DX, DA, DB, DW = (ROWS, RANK), (ROWS, DEPTH), (RANK, DEPTH), (WIDTH, RANK), (WIDTH, DEPTH)


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (("x", "lora_a", "lora_b"), {LOW, DX, DA, DB}),
        (("lora_a", "lora_b"), {LOW, DA, DB}),
        (("x",), {LOW, DX}),
        (("lora_a",), {LOW, DA}),
        (("lora_b",), {DB}),
        (("weight",), {DW}),
        (("bias",), set()),
    ],
)
def test_the_reference_computes_no_gradient_that_is_not_asked_for(needs, expected):
    call = make((ROWS, DEPTH), (WIDTH,), (RANK,), dropout_p=0.1, needs=needs)
    (y,) = fused("reference")(call)
    with Products() as products:
        torch.autograd.backward(y, torch.randn_like(y))
    assert products.shapes == expected


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (("x", "lora_a", "lora_b"), ["grad_input", "factor_grads", "sum"]),
        (("lora_a", "lora_b"), ["project", "factor_grads", "sum"]),
        (("x",), ["grad_input"]),
        (("lora_a",), ["project", "factor_grads", "sum"]),
        (("lora_b",), ["factor_grads", "sum"]),
        (("bias",), []),
    ],
)
def test_the_kernels_compute_no_gradient_that_is_not_asked_for(needs, expected):
    call = make((64, 64), (128,), (16,), dropout_p=0.1, dtype=torch.bfloat16, needs=needs).to("meta")
    (y,) = fused("triton")(call)
    with recording() as launches:
        torch.autograd.backward(y, torch.empty_like(y))
    assert [launch.name.removesuffix("_kernel") for launch in launches] == expected


@every_backend
def test_nothing_is_recorded_without_gradients(backend):
    call = make((4, 6), dtype=torch.float32)
    with torch.no_grad():
        assert not fused(backend)(call)[0].requires_grad
    assert not fused(backend)(call.requiring())[0].requires_grad


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(backend, dtype):
    call = make((33, 72), (40, 24), (3, 16), dropout_p=0.1, dtype=dtype, needs=EVERYTHING)
    first, second = (results(fused(backend), call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = results(fused(backend), call, seed=SEED + 1)
    assert not torch.equal(other["y[0]"], first["y[0]"])


@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("x_dtype", "autocast"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_autocast_over_float32_weights(backend, dropout_p, x_dtype, autocast):
    x = randn(33, 136).to(x_dtype)
    call = make(x, (96,), (16,), dropout_p=dropout_p, dtype=torch.float32, needs=EVERYTHING)

    def under_autocast(function: Callable[[Call], list[Tensor]]) -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, autocast):
            return results(function, call)

    eager = under_autocast(lambda call: composed(replace(call, x=call.x.float())))
    ours = under_autocast(fused(backend))
    assert ours["y[0]"].dtype == autocast and ours["d lora_a[0]"].dtype == torch.float32
    no_worse_than(ours, eager, results(composed, call.to(torch.float64)))


def test_autocast_leaves_float64_alone():
    call = make((4, 6))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (y,) = fused("reference")(call)
    assert torch.equal(y, fused("reference")(call)[0])


@every_backend
def test_scaled_losses_do_not_overflow_float16(backend):
    """PEFT multiplies the gradient by the scale in float16: here to 96 000, where 65 504 is the largest number."""
    x, grad = 1e-3 * randn(64, 64), 3000.0 * torch.randint(-1, 2, (64, 64), device=DEVICE)
    call = replace(make(x.half(), (64,), (8,), dropout_p=0.1, dtype=torch.float16), scales=(32.0,))
    call.members[0].lora_b.detach().mul_(1e-2)
    assert not results(composed, call, [grad.half()])["d lora_b[0]"].isfinite().all()
    exact = results(composed, call.to(torch.float64), [grad.double()])
    for name, found in results(fused(backend), call, [grad.half()]).items():
        assert error(found, exact[name]) < 4 * torch.finfo(torch.float16).eps, name
