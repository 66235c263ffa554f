"""What every operation's cases.py must be."""

from __future__ import annotations

import pytest
import torch

from fastadapt.prove.cases import Cases, operations, outputs_and_gradients

OPERATIONS = operations()


def test_every_operation_has_cases() -> None:
    assert "lora_linear" in OPERATIONS


@pytest.mark.parametrize("cases", OPERATIONS.values(), ids=OPERATIONS)
def test_names_are_unique(cases: Cases) -> None:
    names = [case.name for case in (*cases.SHIPPED, *cases.EDGES)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("cases", OPERATIONS.values(), ids=OPERATIONS)
def test_a_case_has_every_output_and_gradient(cases: Cases) -> None:
    for case in (*cases.SHIPPED, *cases.EDGES):
        tensors = cases.inputs(case, torch.device("meta"))
        found = cases.run(case, tensors, "reference")
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                assert found[f"grad of {name}"].shape == tensor.shape
        assert len(found) > sum(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("cases", OPERATIONS.values(), ids=OPERATIONS)
def test_the_same_inputs_give_the_same_values(cases: Cases) -> None:
    """Masks and output gradients follow from the case alone: without that, nothing could be compared."""
    case = cases.EDGES[0]
    tensors = cases.inputs(case, torch.device("cpu"))
    once, again = (cases.run(case, tensors, "reference") for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_outputs_and_gradients_are_named_and_exact_in_every_dtype() -> None:
    x, frozen = torch.ones(3, 2, requires_grad=True), torch.ones(2)
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        found[dtype] = outputs_and_gradients({"y": (x * frozen).to(dtype)}, {"x": x, "frozen": frozen})
        assert set(found[dtype]) == {"y", "grad of x"} and not found[dtype]["y"].requires_grad
    assert torch.equal(found[torch.float64]["grad of x"], found[torch.bfloat16]["grad of x"])
    assert found[torch.float64]["grad of x"].abs().sum() > 0
