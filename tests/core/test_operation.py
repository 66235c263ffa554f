"""How every operation meets autograd and the compiler, shown on a small one: y = scale * a * b * c, b or c None."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadapt.core.operation import Operation
from tests.tolerance import EXACT

calls: list[tuple] = []  # what the operation's functions were asked for, in order


def forward(tensors, scale: float) -> list[Tensor]:
    """[y, the product before scaling]; the second is an intermediate value that the backward reads."""
    calls.append(("forward",))
    product = tensors[0].clone()
    for factor in tensors[1:]:
        product = product if factor is None else product * factor
    return [scale * product, product]


def save(tensors, outputs, needs) -> list[Tensor | None]:
    calls.append(("save", tuple(needs)))
    return [*tensors, outputs[1]]


def derivative(saved, grads, needs, scale: float) -> list[Tensor]:
    *tensors, product = saved
    d = scale * grads[0] if grads[1] is None else scale * grads[0] + grads[1]
    wanted = []
    for i, need in enumerate(needs):
        if need:
            others = [t for j, t in enumerate(tensors) if j != i and t is not None]
            wanted.append(d * torch.stack(others).prod(0) if others else d.clone())
    return wanted


def backward(saved, grads, needs, scale: float) -> list[Tensor]:
    calls.append(("backward", tuple(needs), grads[1] is None))
    return derivative(saved, grads, needs, scale)


toy = Operation(
    name="test_toy",
    options_schema="float scale",
    forward=forward,
    forward_fake=lambda tensors, scale: [torch.empty_like(tensors[0]) for _ in range(2)],
    primary=lambda count: count // 2,
    save=save,
    backward=backward,
    reference_backward=derivative,
    backward_fake=lambda saved, grads, needs, scale: [torch.empty_like(grads[0]) for need in needs if need],
)
op = torch.ops.fastadapt.test_toy
WAYS = {
    "eager": lambda *tensors: toy(tensors, 3.0)[0],
    "op": lambda *tensors: op(list(tensors), 3.0)[0],
    "compiled": torch.compile(lambda *tensors: toy(tensors, 3.0)[0], fullgraph=True, backend="aot_eager"),
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def _no_calls_yet() -> None:
    calls.clear()


def factors(missing: int | None = None) -> list[Tensor | None]:
    tensors = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return [None if i == missing else tensor for i, tensor in enumerate(tensors)]


def plain(*tensors: Tensor | None) -> Tensor:
    return 3.0 * torch.stack([t for t in tensors if t is not None]).prod(0)


@every_way
@pytest.mark.parametrize("missing", [None, 1, 2])
def test_value_and_gradients_whichever_tensor_is_none(way, missing):
    """A None among the tensors must not cost the others their gradients, as torch.library.register_autograd has it."""
    tensors = factors(missing)
    given = [t for t in tensors if t is not None]
    y = WAYS[way](*tensors)
    torch.testing.assert_close(y, plain(*tensors), **EXACT)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(plain(*tensors), given, grad)
    torch.testing.assert_close(torch.autograd.grad(y, given, grad), expected, **EXACT)


@every_way
def test_only_what_is_needed_is_asked_for(way):
    tensors = factors()
    tensors[1].requires_grad_(False)
    WAYS[way](*tensors).sum().backward()
    needs = (True, False, True)
    assert ("save", needs) in calls and ("backward", needs, True) in calls
    assert tensors[1].grad is None and tensors[0].grad is not None and tensors[2].grad is not None


@pytest.mark.parametrize("way", ["eager", "op"])
def test_first_derivatives_run_the_backward_and_second_ones_the_reference(way):
    tensors = factors()
    WAYS[way](*tensors).sum().backward()
    assert [call[0] for call in calls] == ["forward", "save", "backward"]
    calls.clear()
    torch.autograd.grad(WAYS[way](*tensors).sum(), tensors, create_graph=True)
    assert [call[0] for call in calls] == ["forward", "save"]


@pytest.mark.parametrize("way", ["eager", "op"])
@pytest.mark.parametrize("missing", [None, 2])
def test_derivatives_against_differences(way, missing):
    given = [t for t in factors(missing) if t is not None]

    def function(*tensors: Tensor) -> Tensor:
        return WAYS[way](*tensors, *[None] * (3 - len(tensors)))

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


def test_the_intermediate_value_takes_a_gradient():
    a, b, c = factors()
    for outputs in (toy((a, b, c), 3.0), op([a, b, c], 3.0)):
        calls.clear()
        (found,) = torch.autograd.grad(outputs[1].sum(), a)
        torch.testing.assert_close(found, b * c, **EXACT)
        assert calls == [("backward", (True, True, True), False)]


def test_no_gradient_wanted_nothing_kept():
    tensors = factors()
    with torch.no_grad():
        y = toy(tensors, 3.0)[0]
    assert not y.requires_grad and calls == [("forward",)]
    assert not toy([t.detach() for t in tensors], 3.0)[0].requires_grad


def test_an_operation_whose_outputs_nothing_reads_has_no_backward():
    a, b, c = factors()
    y = toy((a, b, c), 3.0)[0]
    (found,) = torch.autograd.grad((a * 2).sum() + 0 * y.detach().sum(), a)
    assert torch.equal(found, torch.full_like(a, 2))
    assert [call[0] for call in calls] == ["forward", "save"]


def test_saved_tensors_that_changed_are_noticed():
    a, b, c = factors()
    y = toy((a, b, c), 3.0)[0]
    with torch.no_grad():
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode():
    with torch.inference_mode():
        a, b, c = (torch.randn(4) for _ in range(3))
        assert torch.equal(toy((a, b, c), 3.0)[0], 3.0 * (a * b * c))


@pytest.mark.parametrize("missing", [None, 1])
def test_opcheck(missing):
    tensors = factors(missing)
    torch.library.opcheck(op.default, (tensors, 3.0))
    detached = [None if t is None else t.detach() for t in tensors]
    saved = [*detached, op(detached, 3.0)[1]]
    needs = [t is not None for t in tensors]
    grads = [torch.randn(4, dtype=torch.float64), None]
    torch.library.opcheck(torch.ops.fastadapt.test_toy_backward.default, (saved, grads, needs, 3.0))


summed = Operation(
    name="test_summed",
    options_schema="int count",
    forward=lambda tensors, count: [3.0 * tensors[0] + sum(tensors[1 : 1 + count]) + sum(tensors[1 + count :])],
    forward_fake=lambda tensors, count: [torch.empty_like(tensors[0])],
    primary=lambda count: count,
    save=lambda tensors, outputs, needs: calls.append([tensor is None for tensor in tensors]) or [],
    backward=lambda saved, grads, needs, count: calls.append(tuple(needs)) or [3.0 * grads[0]],
    reference_backward=lambda saved, grads, needs, count: [3.0 * grads[0]],
    backward_fake=lambda saved, grads, needs, count: [torch.empty_like(grads[0])],
    added=lambda count: range(1, 1 + count),
)


@every_way
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_gradient_of_what_is_added_is_the_results(way, count):
    """It is passed on, not copied; the backward does not run for it alone, and nothing of it is kept."""
    ways = {
        "eager": lambda *tensors: summed(tensors, count)[0],
        "op": lambda *tensors: torch.ops.fastadapt.test_summed(list(tensors), count)[0],
        "compiled": torch.compile(lambda *tensors: summed(tensors, count)[0], fullgraph=True, backend="aot_eager"),
    }
    x, grad, *added = (torch.randn(4, dtype=torch.float64) for _ in range(2 + count))
    wanted = [x.requires_grad_(), *(b.requires_grad_() for b in added)]
    dx, *found = torch.autograd.grad(ways[way](*wanted), wanted, grad)
    assert torch.equal(dx, 3.0 * grad) and all(torch.equal(db, grad) for db in found)
    kept, asked = [False] + [True] * count, (True,) + (False,) * count
    assert kept in calls and calls[-1] == asked and calls.count(asked) == 1  # a compiler may trace what is kept twice
    assert way == "compiled" or all(db.data_ptr() == grad.data_ptr() for db in found)
    calls.clear()
    if count:
        (db,) = torch.autograd.grad(ways[way](x.detach(), *added), added[:1], grad)
        assert torch.equal(db, grad) and all(isinstance(call, list) for call in calls)


def test_what_is_added_in_a_narrower_dtype_gets_its_gradient_in_it():
    x, b = torch.randn(4, requires_grad=True), torch.randn(4).bfloat16().requires_grad_()
    for y in (summed([x, b], 1)[0], torch.ops.fastadapt.test_summed([x, b], 1)[0]):
        grad = torch.randn(4)
        (db,) = torch.autograd.grad(y, b, grad)
        assert db.dtype == torch.bfloat16 and torch.equal(db, grad.bfloat16())
