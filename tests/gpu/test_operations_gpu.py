"""Every operation's shipped calls on a GPU: right, the same bits every time, and as they are in a replayed CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.prove.cases import Cases, operations
from fastadapt.prove.verify import check_values

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
RUNS = 20
CALLS = [
    pytest.param(cases, case, id=f"{name}, {case.name}") for name, cases in operations().items() for case in cases.SHIPPED
]
every_call = pytest.mark.parametrize(("cases", "case"), CALLS)


@every_call
def test_right_and_complete(cases: Cases, case: Any):
    assert check_values(cases, case, GPU, "triton")["reason"] == ""


@every_call
def test_the_order_in_which_programs_finish_does_not_show(cases: Cases, case: Any):
    tensors = cases.inputs(case, GPU)
    first = cases.run(case, tensors, "triton")
    for _ in range(RUNS):
        again = cases.run(case, tensors, "triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.fixture
def fixed_numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Random integers, of which the gradients of the outputs and dropout's seeds are made, are drawn once for each size."""
    drawn: dict[tuple, Tensor] = {}
    draw = torch.randint

    def again(low: int, high: int, size: Any, **options: Any) -> Tensor:
        key = (low, high, *size)
        if key not in drawn:
            drawn[key] = draw(low, high, size, **options)
        return drawn[key]

    monkeypatch.setattr(torch, "randint", again)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)  # which no graph can capture
    yield


def captured(step: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of the step, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, and libraries set up, before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@every_call
@pytest.mark.usefixtures("fixed_numbers")
def test_a_graph_replays_a_call_bit_for_bit(cases: Cases, case: Any):
    tensors = cases.inputs(case, GPU)
    expected = cases.run(case, tensors, "triton")
    graph, found = captured(lambda: cases.run(case, tensors, "triton"))
    for tensor in found.values():
        tensor.zero_()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
