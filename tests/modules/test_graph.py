"""graph_step: its checks and eager path anywhere, its replays on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastadapt import PhiloxDropout, graph_step
from fastadapt.modules.graph import check_capturable
from tests.tolerance import SINGLE


def training(device: str, dropout: float = 0.0, optimizer=torch.optim.SGD, **options):
    """A model and a step that trains it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), PhiloxDropout(dropout), nn.ReLU(), nn.Linear(16, 1)).to(device)
    optimizer = optimizer(model.parameters(), lr=0.05, **options)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, step


def batches(count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 8, device=device), torch.randn(4, 1, device=device)) for _ in range(count)]


def test_the_eager_fallback_trains_as_the_step_does():
    model, optimizer, step = training("cpu", optimizer=torch.optim.AdamW)
    twin, _, plain = training("cpu", optimizer=torch.optim.AdamW)
    graphed = graph_step(step, optimizer, fallback="eager")
    for batch in batches(6, "cpu"):
        assert torch.equal(graphed(*batch), plain(*batch))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_without_a_gpu_it_refuses():
    model, _, step = training("cpu")
    before = copy.deepcopy(model.state_dict())
    message = "first tensor on a CUDA device, got one on cpu; fallback='eager' runs"
    with pytest.raises(RuntimeError, match=message):
        graph_step(step)(*batches(1, "cpu")[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "inputs: expected at least one tensor, got none"),
        ((torch.zeros(2), 3), r"inputs\[1\]: expected a tensor, got int"),
        ((torch.zeros(2),), "inputs: expected 2 tensors, as in the first call, got 1"),
        ((torch.zeros(3), torch.zeros(2)), r"inputs\[0\]: expected torch.float32 of shape \(2,\), as first, got .*\(3,\)"),
        ((torch.zeros(2), torch.zeros(2).double()), r"inputs\[1\]: expected torch.float32 .* got torch.float64"),
    ],
)
def test_the_shapes_are_the_first_calls(inputs, message):
    graphed = graph_step(lambda x, y: x + y, fallback="eager")
    graphed(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        graphed(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"warmup": 0}, "warmup: expected at least 1"), ({"fallback": "cpu"}, "fallback: expected None or 'eager', got 'cpu'")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        graph_step(print, **options)


def test_an_optimizer_that_keeps_its_state_on_the_host_is_refused():
    parameters = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="optimizer: expected capturable=True, .* got False in parameter group 0"):
        check_capturable(torch.optim.AdamW(parameters))
    for good in (None, torch.optim.SGD(parameters), torch.optim.AdamW(parameters, capturable=True)):
        check_capturable(good)


@pytest.mark.gpu
def test_replays_train_as_the_step_does():
    model, optimizer, step = training("cuda", optimizer=torch.optim.AdamW, capturable=True)
    twin, _, plain = training("cuda", optimizer=torch.optim.AdamW, capturable=True)
    graphed = graph_step(step, optimizer)
    for batch in batches(8, "cuda"):
        torch.testing.assert_close(graphed(*batch), plain(*batch), **SINGLE)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), **SINGLE)


@pytest.mark.gpu
def test_dropout_is_drawn_anew_in_each_replay():
    model, _, _ = training("cuda", dropout=0.5)
    x = torch.randn(4, 8, device="cuda")
    graphed = graph_step(lambda x: model(x).detach(), warmup=1)
    outputs = [graphed(x).clone() for _ in range(6)]
    assert len({tuple(y.flatten().tolist()) for y in outputs}) == 6


@pytest.mark.gpu
def test_a_capture_refuses_host_state():
    _, optimizer, step = training("cuda", optimizer=torch.optim.AdamW)
    with pytest.raises(ValueError, match="capturable=True"):
        graph_step(step, optimizer)(*batches(1, "cuda")[0])
