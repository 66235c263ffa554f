"""The reference in float64 against a plain composition of torch functions, and its derivatives against differences."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch

from bench.memory import saved_bytes
from fastadapt import lora_linear
from tests.kernels.lora_linear.calls import EVERYTHING, Call, Member, composed, fused, make, results
from tests.tolerance import EXACT, no_worse_than

reference = fused("reference")


def check(call: Call) -> None:
    torch.testing.assert_close(results(reference, call), results(composed, call), **EXACT)


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


LAYOUTS = {
    "vector": lambda: torch.randn(20),
    "3-D": lambda: torch.randn(3, 4, 20),
    "4-D": lambda: torch.randn(2, 3, 1, 20),
    "transposed": lambda: torch.randn(20, 12).t(),
    "tokens first": lambda: torch.randn(4, 3, 20).transpose(0, 1),
    "sliced": lambda: torch.randn(6, 5, 50)[::2, 1:, 3:43:2],
    "expanded rows": lambda: torch.randn(1, 20).expand(6, 20),
    "expanded columns": lambda: torch.randn(6, 1).expand(6, 20),
    "no rows": lambda: torch.randn(0, 20),
    "no rows in 3-D": lambda: torch.randn(3, 0, 20),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_x(layout, dropout_p):
    x = LAYOUTS[layout]().double()
    call = make(x, (7, 5), (3, 2), dropout_p=dropout_p, needs=EVERYTHING)
    assert call.x.stride() == x.stride()
    check(call)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_any_layout_of_the_outputs_gradient(layout):
    gradient = LAYOUTS[layout]().double()
    call = make((*gradient.shape[:-1], 9), (gradient.shape[-1],), dropout_p=0.3, needs=EVERYTHING)
    torch.testing.assert_close(results(reference, call, [gradient]), results(composed, call, [gradient]), **EXACT)


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


def test_an_output_that_nothing_reads_has_no_gradient():
    call = make((4, 6), (5, 3, 2), (2, 1, 3), dropout_p=0.3)
    first, _, last = reference(call)
    found = torch.autograd.grad([first, last], [call.x, call.members[0].lora_a], [first, last], retain_graph=True)
    plain = composed(call)
    expected = torch.autograd.grad([plain[0], plain[2]], [call.x, call.members[0].lora_a], [plain[0], plain[2]])
    torch.testing.assert_close(found, expected, **EXACT)
    (of_the_unread,) = torch.autograd.grad(last.sum(), call.members[1].lora_b)
    assert not of_the_unread.any()


def test_evaluation_drops_nothing_and_draws_nothing():
    call = make((4, 6))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    y = lora_linear(call.x, *call.members[0], scale=call.scales[0], dropout_p=0.5, training=False)
    torch.testing.assert_close(y, composed(call)[0], **EXACT)
    torch.manual_seed(1)
    fewer = lora_linear(call.x, *call.members[0], scale=call.scales[0], dropout_p=1e-6)  # below dropout's resolution
    assert torch.equal(fewer, y) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("group", GROUPS)
def test_derivatives_of_first_and_second_order(group, dropout_p):
    widths = {"widths": (3, 1, 2), "ranks": (2, 1, 2)} if group == "three" else {"widths": (3,)}
    call = make((4, 5), **GROUPS[group] | widths, dropout_p=dropout_p, needs=EVERYTHING)
    tensors = list(call.tensors.values())

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = iter(tensors[1:])
        members = tuple(Member(*(None if t is None else next(flat) for t in member)) for member in call.members)
        return tuple(reference(replace(call, x=tensors[0], members=members)))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


ROWS, DEPTH, WIDTH, RANK = 32, 24, 40, 3
X, PRODUCT, SEED = ROWS * DEPTH * 4, ROWS * RANK * 4, 8  # bytes


@pytest.mark.parametrize(
    ("needs", "dropout_p", "expected"),
    [
        (("x", "lora_a", "lora_b"), 0.0, X + PRODUCT),
        (("x", "lora_a", "lora_b"), 0.1, X + PRODUCT + SEED),
        (("lora_a",), 0.0, X),
        (("weight",), 0.0, X),
        (("x", "lora_b"), 0.0, PRODUCT),  # LoRA-FA: A is frozen
        (("x", "lora_b"), 0.1, PRODUCT + SEED),
        (("x",), 0.0, 0),
        (("bias",), 0.0, 0),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_kept_for_the_backward(needs, dropout_p, expected, backend):
    call = make((ROWS, DEPTH), (WIDTH,), (RANK,), dropout_p=dropout_p, dtype=torch.float32, needs=needs).to("meta")
    parameters = [tensor for tensor in call.members[0] if tensor is not None]
    assert saved_bytes(lambda: fused(backend)(call), exclude=parameters) == expected


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype, dropout_p):
    call = make((65, 130), (96, 40), (16, 3), dropout_p=dropout_p, dtype=dtype, needs=EVERYTHING)
    exact = results(composed, call.to(torch.float64))
    no_worse_than(results(reference, call), results(composed, call), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_on_a_half_precision_linear(dtype):
    call = make((65, 130), dtype=dtype, adapter_dtype=torch.float32, dropout_p=0.1, needs=EVERYTHING)
    found = results(reference, call)
    assert found["d lora_a[0]"].dtype == found["d lora_b[0]"].dtype == torch.float32
    no_worse_than(found, results(composed, call), results(composed, call.to(torch.float64)))
