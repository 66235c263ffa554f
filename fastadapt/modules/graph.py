"""A whole training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastadapt.core.checks import fail


class graph_step:
    """A training step for static shapes that a GPU replays as one CUDA graph: one launch in place of thousands.

        def step(image, ids, target):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model(image, ids), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        graphed = fastadapt.graph_step(step, optimizer)
        for batch in batches:
            loss = graphed(*batch)

    The first `warmup` calls run the step as it is, on a stream of its own, and are steps of the training like all others.  The
    next one captures the step and replays it; every later one copies its arguments into the captured ones and replays.
    Dropout is drawn anew in each replay, torch's own and fastadapt's, whose seeds come from the same generator.

    Args:
        step: a function of tensors that does all of a step and nothing with the host: no item(), no shapes that depend on
            values, no Python number that changes, such as a learning rate (it may be a tensor) or a GradScaler's decision.
        optimizer: the one that step uses, to be checked; None for a step without.
        warmup: steps before the capture, at least 1.
        fallback: "eager" runs every step as it is where its first tensor is not on a CUDA device; None refuses.

    A call takes the step's arguments, tensors of the shapes and dtypes of the first call, and returns what the step returns.
    After a replay that is the graph's own memory, which the next one overwrites: clone what is to be kept.

    Raises:
        ValueError: warmup below 1 or an unknown fallback; in a call: an argument that is no tensor, or whose shape or dtype is
            not the first call's; on a GPU, a parameter group of the optimizer that has capturable=False.
        RuntimeError: in a call: the first argument is not on a CUDA device and there is no fallback, or capturing failed.

    There is no speed to it where the GPU is busy; it saves the host's time between launches.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        optimizer: Optimizer | None = None,
        *,
        warmup: int = 3,
        fallback: str | None = None,
    ) -> None:
        if warmup < 1:
            fail("warmup", "at least 1", warmup)
        if fallback not in (None, "eager"):
            fail("fallback", "None or 'eager'", repr(fallback))
        self.step, self.optimizer, self.warmup, self.fallback = step, optimizer, warmup, fallback
        self.calls = 0
        self._specs: list[tuple[torch.Size, torch.dtype]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        self._check(inputs)
        self.calls += 1
        if inputs[0].device.type != "cuda":
            if self.fallback is None:
                raise RuntimeError(
                    f"graph_step: expected the step's first tensor on a CUDA device, got one on {inputs[0].device}; "
                    "fallback='eager' runs the step without a graph"
                )
            return self.step(*inputs)
        check_capturable(self.optimizer)
        if self.calls <= self.warmup:
            return self._aside(inputs)
        if self._graph is None:
            self._capture(inputs)
        for static, given in zip(self._inputs, inputs):
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        if not inputs:
            fail("inputs", "at least one tensor", "none")
        for i, given in enumerate(inputs):
            if not isinstance(given, Tensor):
                fail(f"inputs[{i}]", "a tensor", type(given).__name__)
        specs = [(given.shape, given.dtype) for given in inputs]
        self._specs = self._specs or specs
        if len(specs) != len(self._specs):
            fail("inputs", f"{len(self._specs)} tensors, as in the first call", len(specs))
        for i, (found, first) in enumerate(zip(specs, self._specs)):
            if found != first:
                fail(f"inputs[{i}]", f"{first[1]} of shape {tuple(first[0])}, as first", f"{found[1]} of {tuple(found[0])}")

    def _aside(self, inputs: tuple[Tensor, ...]) -> Any:
        """The step on a side stream, where the capture's allocations and autograd's streams are warmed up."""
        current = torch.cuda.current_stream(inputs[0].device)
        self._stream = self._stream or torch.cuda.Stream(inputs[0].device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self.step(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [given.detach().to(inputs[0].device, copy=True) for given in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph):
            self._outputs = self.step(*self._inputs)
        self._graph = graph


def check_capturable(optimizer: Optimizer | None) -> None:
    """No parameter group of the optimizer keeps its state on the host."""
    for i, group in enumerate(optimizer.param_groups if optimizer else ()):
        if group.get("capturable") is False:
            fail("optimizer", "capturable=True, which keeps its state on the GPU", f"False in parameter group {i}")
