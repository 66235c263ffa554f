"""A training step of a method on meta tensors, and what it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastadapt.core.checks import fail
from fastadapt.core.launch import recording
from fastadapt.models.common.method import Method
from fastadapt.models.common.table import Row, Share, count_parts, part_of
from fastadapt.models.plan.gpus import Gpu
from fastadapt.models.plan.trace import Trace
from fastadapt.prove.meta import as_on_cuda, autocast
from fastadapt.prove.saved import saved_by_label

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What one training step needs.

    parts, shares: the parameters, and the percentages with what they are percentages of.
    forward_flops, backward_flops: of the whole batch; a multiply-add is two.
    saved: bytes kept for the backward, by region.
    resident: bytes of parameters, buffers, inputs and Adam's two moments.
    peak: bytes at most during the step: resident, and what the step makes, gradients included.  No library workspace, no
        fragmentation, no CUDA context.
    bytes: read and written by the step.
    seconds: of the step at the GPU's limits, kernel by kernel: no implementation of these kernels is faster.
    """

    parts: list[Row]
    shares: list[Share]
    forward_flops: float
    backward_flops: float
    saved: Counter[str]
    resident: int
    peak: int
    bytes: float
    seconds: float


def make(method: Method, arm: str, preset: str | None = None, **changes: Any) -> nn.Module:
    """The method's model on the meta device, in training mode."""
    config = method.config.preset(preset or method.preset, arm=arm, **changes)
    with torch.device("meta"):
        return method.model(config).train()


def measure(method: Method, model: nn.Module, batch: int, dtype: str, gpu: Gpu) -> Plan:
    """Count a training step of this many samples: parameters in float32, under autocast where the dtype is of 16 bits."""
    step = Step(method, model, batch, dtype)
    saved = step.saved()
    peak, (forward_flops, backward_flops) = step.peak(gpu), step.flops(gpu)
    kernels = step.kernels(gpu)
    # our kernels have no formula of operations: what the references do beyond what was counted, on tensor cores
    hidden = max(forward_flops + backward_flops - kernels.flops, 0) / gpu.rate(DTYPES[dtype], convolution=False)
    resident = _size(step.given) + 2 * _size(step.trained)
    return Plan(
        parts=count_parts(model, method.parts),
        shares=method.shares(model),
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        saved=saved,
        resident=resident,
        peak=resident + peak,
        bytes=kernels.bytes,
        seconds=kernels.seconds + hidden,
    )


class Step:
    """A training step on meta tensors, which each method runs afresh.

    given: what is there before the step: parameters, buffers and inputs.
    """

    def __init__(self, method: Method, model: nn.Module, batch: int, dtype: str) -> None:
        if dtype not in DTYPES:
            fail("dtype", f"one of {', '.join(DTYPES)}", repr(dtype))
        if batch < 1:
            fail("batch", "at least 1", batch)
        self.method, self.model, self.dtype = method, model, DTYPES[dtype]
        self.inputs = method.inputs(model.config, batch, "meta")
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.given = [*model.parameters(), *model.buffers(), *self.inputs.values()]

    def saved(self) -> Counter[str]:
        """Bytes kept for the backward, by region, in the regions' order."""
        regions = self.method.regions
        with as_on_cuda(), autocast(self.dtype), _running(self.model) as running:
            found = saved_by_label(self._forward, self.given, lambda: _region(regions, running))
        return Counter({region: found[region] for region in regions if found[region]})

    def peak(self, gpu: Gpu) -> int:
        """Bytes at most of what the step makes."""
        with as_on_cuda(), autocast(self.dtype), Trace(gpu, self.given) as trace:
            self._forward().backward()
            self._end()
        return trace.peak

    def kernels(self, gpu: Gpu) -> Trace:
        """Every kernel's traffic, ours included, and the time of all at the GPU's limits."""
        with as_on_cuda(), autocast(self.dtype), recording() as launches, Trace(gpu, self.given) as trace:
            self._forward().backward()
            self._end()
        for launch in launches:
            trace.add(0, [argument for argument in launch.args if isinstance(argument, Tensor)])
        return trace

    def flops(self, gpu: Gpu) -> tuple[int, int]:
        """Operations of forward and backward, fastadapt's counted from their references."""
        with as_on_cuda(triton=False), autocast(self.dtype), Trace(gpu, self.given) as trace:
            loss = self._forward()
            forward = trace.flops
            loss.backward()
            self._end()
        return forward, trace.flops - forward

    def _forward(self) -> Tensor:
        return self.model(**self.inputs).loss

    def _end(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the model's modules that are running, outermost first, kept up to date inside the block.

    By hooks of all modules at once: a module that has hooks of its own may take another path.
    """
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            running.append(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in names:
            running.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _region(regions: Mapping[str, Sequence[str]], running: list[str]) -> str:
    """The earliest region that one of the running modules, innermost or around it, fits."""
    order = list(regions)
    return min((found for name in running if (found := part_of(name, regions)) is not None), key=order.index)


def _size(tensors: list[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
