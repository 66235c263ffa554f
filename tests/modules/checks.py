"""What every module has to stand, given how to run it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.tolerance import EXACT

Run = Callable[[nn.Module, Sequence[Tensor]], Tensor]


def randomise(module: nn.Module) -> nn.Module:
    """The module in float64, with no parameter at a value that hides an error."""
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def round_trips(module: nn.Module, inputs: Sequence[Tensor], run: Run) -> None:
    """A deep copy computes the same, and so does another module once it has loaded the state dict."""
    twin, state = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    expected = run(module, inputs)
    assert torch.equal(run(twin, inputs), expected)
    other = randomise(copy.deepcopy(twin))
    assert not torch.allclose(run(other, inputs), expected)
    other.load_state_dict(state)
    assert torch.equal(run(other, inputs), expected)


def compiles(module: nn.Module, inputs: Sequence[Tensor], run: Run) -> None:
    """Compiled without a graph break, outputs and gradients are the same."""
    twin = copy.deepcopy(module)
    results = []
    for called, owner in ((module, module), (torch.compile(twin, fullgraph=True, backend="aot_eager"), twin)):
        y = run(called, inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), [*inputs, *owner.parameters()])))
    torch.testing.assert_close(*results, **EXACT)


def runs_under_autocast(module: nn.Module, inputs: Sequence[Tensor], run: Run) -> None:
    """In bfloat16 by autocast the output of a float64 module is near, and every parameter has a finite gradient."""
    exact = run(module, inputs)
    module, inputs = copy.deepcopy(module).float(), [x.float() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        got = run(module, inputs)
    assert torch.linalg.vector_norm(got.double() - exact) < 0.05 * torch.linalg.vector_norm(exact)
    got.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def with_gradients(y: Tensor, module: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """y and the gradients of the inputs and of every parameter."""
    wanted = {**inputs, **dict(module.named_parameters())}
    grad = torch.linspace(-3, 3, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y.dtype)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad)))}
