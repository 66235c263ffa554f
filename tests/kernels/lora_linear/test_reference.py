"""The reference and its copy in C++, in float64, against a composition of torch functions and against differences."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from bench.memory import saved_bytes
from fastadapt import lora_linear, native
from tests.kernels.lora_linear.calls import (
    DEVICE,
    EVERYTHING,
    FLOAT64_BACKENDS,
    LAYOUTS,
    SEED,
    Call,
    Member,
    composed,
    fused,
    laid_out,
    make,
    results,
)
from tests.tolerance import EXACT, no_worse_than

every_backend = pytest.mark.parametrize("backend", FLOAT64_BACKENDS)


def check(call: Call, grads: list[Tensor] | None = None) -> None:
    for backend in FLOAT64_BACKENDS:
        torch.testing.assert_close(results(fused(backend), call, grads), results(composed, call, grads), **EXACT)


GROUPS = {
    "one": {},
    "one without bias": {"biases": (False,)},
    "rank 1": {"ranks": (1,)},
    "three": {"widths": (7, 1, 12), "ranks": (3, 1, 5), "biases": (True, False, True)},
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("group", GROUPS)
def test_values_and_every_gradient(group, dropout_p):
    check(make((9, 21), **GROUPS[group], dropout_p=dropout_p, needs=EVERYTHING))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout, dropout_p):
    x = laid_out(layout)
    call = make(x, (7, 5), (3, 2), dropout_p=dropout_p, needs=EVERYTHING)
    assert call.x.stride() == x.stride()
    check(call)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_any_layout_of_the_outputs_gradient(layout):
    gradient = laid_out(layout)
    call = make((*gradient.shape[:-1], 9), (gradient.shape[-1],), dropout_p=0.3, needs=EVERYTHING)
    check(call, [gradient])


def test_any_layout_of_the_weights():
    call = make((5, 12), (12,), (12,), needs=EVERYTHING)
    turned = Member(*(tensor.detach().t() if tensor.ndim == 2 else tensor for tensor in call.members[0]))
    check(replace(call, members=(turned,), dropout_p=0.2).requiring(*EVERYTHING))


SUBSETS = list(chain.from_iterable(combinations(EVERYTHING, n) for n in range(1, 6)))


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(needs):
    check(make((4, 6), (5, 3), (2, 1), dropout_p=0.3, needs=needs))


def test_members_of_a_group_may_need_different_gradients():
    check(make((4, 6), (5, 3), (2, 1), dropout_p=0.3, needs=("lora_a[0]", "bias[0]", "lora_b[1]")))


@every_backend
def test_an_output_that_nothing_reads(backend):
    call = make((4, 6), (5, 3, 2), (2, 1, 3), dropout_p=0.3, needs=("x", "lora_a[0]", "lora_b[2]"))
    found, expected = (results(lambda call: function(call)[::2], call) for function in (fused(backend), composed))
    torch.testing.assert_close(found, expected, **EXACT)
    unread = call.requiring("lora_a[1]").members[1].lora_a
    (gradient,) = torch.autograd.grad(fused(backend)(call)[0].sum(), unread, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_evaluation_drops_nothing_and_draws_nothing():
    call = make((4, 6))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    y = lora_linear(call.x, *call.members[0], scale=call.scales[0], dropout_p=0.5, training=False)
    torch.testing.assert_close(y, composed(call)[0], **EXACT)
    torch.manual_seed(1)
    fewer = lora_linear(call.x, *call.members[0], scale=call.scales[0], dropout_p=1e-6)  # below dropout's resolution
    assert torch.equal(fewer, y) and torch.equal(torch.get_rng_state(), state)


@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("group", GROUPS)
def test_derivatives_of_first_and_second_order(group, dropout_p, backend):
    widths = {"widths": (3, 1, 2), "ranks": (2, 1, 2)} if group == "three" else {"widths": (3,)}
    call = make((3, 4), **GROUPS[group] | widths, dropout_p=dropout_p, needs=EVERYTHING)
    tensors = list(call.tensors.values())

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        return tuple(fused(backend)(call.with_tensors(*tensors)))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


ROWS, DEPTH, WIDTH, RANK = 32, 24, 40, 3
X, PRODUCT, SEED_ITSELF = ROWS * DEPTH * 4, ROWS * RANK * 4, 8  # bytes


@pytest.mark.parametrize(
    ("needs", "dropout_p", "expected"),
    [
        (("x", "lora_a", "lora_b"), 0.0, X + PRODUCT),
        (("x", "lora_a", "lora_b"), 0.1, X + PRODUCT + SEED_ITSELF),
        (("lora_a",), 0.0, X),
        (("weight",), 0.0, X),
        (("x", "lora_b"), 0.0, PRODUCT),  # LoRA-FA: A is frozen
        (("x", "lora_b"), 0.1, PRODUCT + SEED_ITSELF),
        (("x",), 0.0, 0),
        (("bias",), 0.0, 0),
    ],
)
@pytest.mark.parametrize(("backend", "device"), [("reference", "meta"), ("native", "cpu"), ("triton", "meta")])
def test_what_is_kept_for_the_backward(needs, dropout_p, expected, backend, device):
    call = make((ROWS, DEPTH), (WIDTH,), (RANK,), dropout_p=dropout_p, dtype=torch.float32, needs=needs).to(device)
    parameters = [tensor for tensor in call.members[0] if tensor is not None]
    assert saved_bytes(lambda: fused(backend)(call), exclude=parameters) == expected


@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype, dropout_p, backend):
    call = make((65, 130), (96, 40), (16, 3), dropout_p=dropout_p, dtype=dtype, needs=EVERYTHING)
    no_worse_than(results(fused(backend), call), results(composed, call), results(composed, call.to(torch.float64)))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_on_a_half_precision_linear(dtype, backend):
    call = make((65, 130), dtype=dtype, adapter_dtype=torch.float32, dropout_p=0.1, needs=EVERYTHING)
    found = results(fused(backend), call)
    assert found["d lora_a[0]"].dtype == found["d lora_b[0]"].dtype == torch.float32
    no_worse_than(found, results(composed, call), results(composed, call.to(torch.float64)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the C++ kernels run on the CPU")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("group", GROUPS)
def test_cpp_kernels_under_pythons_autograd(group, dropout_p, monkeypatch):
    """As with a torch for which the C++ autograd node was not built."""
    monkeypatch.setattr(native, "differentiable", lambda: False)
    call = make((9, 21), **GROUPS[group], dropout_p=dropout_p, needs=EVERYTHING)
    torch.testing.assert_close(results(fused("native"), call), results(composed, call), **EXACT)
