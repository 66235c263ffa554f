"""Cases of operations that are functions of named tensors: their inputs, their arms, and how an arm is verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.case import COMPILED, Arm, Case, Work
from bench.cases.common import PRECISIONS, SEED, autocasting
from bench.clocks import ROTATION
from bench.compiled import compile_function
from fastadapt.prove.judge import Verdict, judge, poisoned

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]  # from the tensors of a call to its results, both by name
Layout = Callable[[Tensor], Tensor]

# allowed in float32 however exact the equation is: sums over hundreds of keys in another order differ by more than a few
FLOAT32_ROUNDINGS = 16.0


@dataclass(frozen=True)
class Normal:
    """A tensor of normal numbers: its shape, their standard deviation, and whether it requires a gradient."""

    shape: tuple[int, ...]
    std: float = 1.0
    requires_grad: bool = True

    def draw(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.shape, device=device).mul_(self.std).to(dtype).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Workload:
    """A call of an operation and the functions that compute it.

    name, params, work: as in Case; precision: one of PRECISIONS.
    activations: the inputs that each of ROTATION sets has of its own; parameters: those that all sets share;
        results: the shapes of what is computed.
    arms: the functions by the arm's name; the first is the equation as it is written, which all are verified against.
    compiled: the function that the arm COMPILED compiles.
    layouts: for arms whose activations and results lie otherwise in memory, the function that turns one layout into
        the other, either way.
    """

    name: str
    params: dict[str, Any]
    precision: str
    activations: Mapping[str, Normal]
    parameters: Mapping[str, Normal]
    results: Mapping[str, tuple[int, ...]]
    arms: Mapping[str, Function]
    compiled: Function
    work: dict[str, Work | None]
    layouts: Mapping[str, Layout] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the arms of a workload share.

    activations: one dict for each set; parameters: what the sets have in common; grads: the gradient of every result.
    """

    workload: Workload
    device: torch.device
    autocast: torch.dtype | None
    activations: Sequence[Tensors]
    parameters: Tensors
    grads: Tensors

    @cached_property
    def eager(self) -> Tensors:
        """What the equation gives in the workload's own precision."""
        return self._equation()

    @cached_property
    def exact(self) -> Tensors:
        """What the equation gives in float64."""
        double = {
            "activations": [_each(Tensor.double, self.activations[0])],
            "parameters": _each(Tensor.double, self.parameters),
            "grads": _each(Tensor.double, self.grads),
        }
        return replace(self, autocast=None, **double)._equation()

    def laid_out(self, layout: Layout) -> Inputs:
        """The same with every activation in another layout."""
        activations = [_each(layout, tensors) for tensors in self.activations]
        return replace(self, activations=activations, grads=_each(layout, self.grads))

    def _equation(self) -> Tensors:
        return _arm(self, next(iter(self.workload.arms))).outputs(False)


def case(workload: Workload) -> Case:
    """The Case of a workload."""
    dtype, autocast = PRECISIONS[workload.precision]
    return Case(
        name=workload.name,
        params=workload.params,
        dtype=autocast or dtype,
        autocast=autocast is not None,
        make_inputs=lambda device: _make_inputs(workload, device),
        arms={name: partial(_arm, name=name) for name in (*workload.arms, COMPILED)},
        verify=_verify,
        work=workload.work,
    )


def _make_inputs(workload: Workload, device: torch.device) -> Inputs:
    """Tensors from SEED; activations have autocast's dtype where there is one, as between the layers of a model."""
    dtype, autocast = PRECISIONS[workload.precision]
    torch.manual_seed(SEED)
    activations = [
        {name: normal.draw(device, autocast or dtype) for name, normal in workload.activations.items()}
        for _ in range(1 if device.type == "meta" else ROTATION)
    ]
    parameters = {name: normal.draw(device, dtype) for name, normal in workload.parameters.items()}
    grads = {
        name: Normal(shape, requires_grad=False).draw(device, autocast or dtype) for name, shape in workload.results.items()
    }
    return Inputs(workload, device, autocast, activations, parameters, grads)


def _arm(inputs: Inputs, name: str) -> Arm:
    workload = inputs.workload
    function = compile_function(workload.compiled) if name == COMPILED else workload.arms[name]
    layout = workload.layouts.get(name, _as_it_is)
    own = inputs.laid_out(layout)
    sets = [tensors | own.parameters for tensors in own.activations]
    trained = [key for key, tensor in sets[0].items() if tensor.requires_grad]

    def forward(i: int) -> tuple[Tensors, Tensors]:
        with autocasting(own.device, own.autocast):
            return sets[i], function(sets[i])

    def backward(call: tuple[Tensors, Tensors]) -> tuple[Tensor, ...]:
        tensors, results = call
        leaves = [tensors[key] for key in trained]
        # inference has nothing to go back to
        return torch.autograd.grad([results[key] for key in own.grads], leaves, list(own.grads.values())) if leaves else ()

    def outputs(dropout: bool) -> Tensors:
        # compiled code allocates by itself, and would be compiled once more for poisoned memory
        with nullcontext() if name == COMPILED else poisoned():
            call = forward(0)
            grads = dict(zip(trained, backward(call)))
        found = {key: layout(result.detach()) for key, result in call[1].items()}
        return found | {f"d{key}": grad if key in own.parameters else layout(grad) for key, grad in grads.items()}

    return Arm(forward=forward, backward=backward, outputs=outputs, constants=list(own.parameters.values()))


def _verify(name: str, arm: Arm, inputs: Inputs) -> dict[str, Verdict]:
    """Against the equation in float64, beside the equation in the same dtype."""
    dtype = inputs.autocast or PRECISIONS[inputs.workload.precision][0]
    options = {"roundings": FLOAT32_ROUNDINGS} if dtype is torch.float32 else {}
    return {"no dropout": judge(arm.outputs(False), inputs.eager, inputs.exact, dtype, **options)}


def _each(convert: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    """Each of `tensors` converted, a leaf that requires a gradient if it did."""
    return {name: convert(tensor.detach()).requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
