"""What a GPU has no clock for: kernel launches of a step, and microseconds the host spends on a layer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastadapt
from fastadapt.core.launch import recording

# operations that start no kernel though they are not marked as views: allocation, views PyTorch makes of fresh
# results, and arithmetic of dtypes
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE |= {"_unsafe_view", "lift_fresh", "promote_types"}


@dataclass(frozen=True)
class Launches:
    """Kernel launches by name: PyTorch operations, each counted as the one kernel it needs, and Triton kernels."""

    torch: Counter[str] = field(default_factory=Counter)
    triton: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.torch.total() + self.triton.total()


@contextmanager
def counting() -> Iterator[Launches]:
    """Count the launches made inside the block; on the meta device nothing runs and all are counted."""
    launches = Launches()
    with recording(arguments=False) as started, _CountOperations(launches.torch):
        yield launches
    launches.triton.update(launch.name for launch in started)


class _CountOperations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class HostTime:
    """Microseconds of host time for one linear, forward and backward, and what LoRA adds to them.

    It is added as PEFT's layer, as that layer fused, and as the operation alone, without the module around it.
    """

    frozen_us: float
    peft_us: float
    fastadapt_us: float
    operation_us: float

    @property
    def ratio(self) -> float:
        """What the fused layer adds over what PEFT's adds, in one run on one core."""
        return self.fastadapt_us / self.peft_us

    @property
    def operation_ratio(self) -> float:
        """The same for the operation alone."""
        return self.operation_us / self.peft_us


def host_overhead(
    dropout_p: float = 0.0, *, width: int = 64, rows: int = 4, r: int = 8, blocks: int = 80, steps: int = 40
) -> HostTime:
    """Time a linear so small that only the host's work counts, with the arms in turn, and keep each one's
    fastest block.

    The fastest of many interleaved blocks is what the code costs when nothing else runs: repeatable to a few per cent
    on a machine where the median is not.
    """
    layers = small_layers(width, r, dropout_p)
    layers["operation"] = _operation(layers["fastadapt"], dropout_p)
    x = torch.randn(1, rows, width, requires_grad=True)  # tokens, as a model's layers see them
    grad = torch.randn(1, rows, width)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {name: min(times) for name, times in _blocks(layers, x, grad, blocks, steps).items()}
    finally:
        torch.set_num_threads(threads)
    frozen = seconds.pop("frozen")
    return HostTime(1e6 * frozen, *(1e6 * (added - frozen) for added in seconds.values()))


def small_layers(width: int, r: int, dropout_p: float) -> dict[str, nn.Module]:
    """The three arms of a linear (width, width): frozen, wrapped by PEFT, and that fused."""
    from peft import LoraConfig, inject_adapter_in_model

    def wrapped() -> nn.Module:
        config = LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout_p, target_modules=["0"])
        return inject_adapter_in_model(config, nn.Sequential(nn.Linear(width, width)))

    frozen = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    return {"frozen": frozen[0], "PEFT": wrapped()[0], "fastadapt": fastadapt.fuse(wrapped())[0]}


def _operation(layer: nn.Module, dropout_p: float) -> Callable[[torch.Tensor], torch.Tensor]:
    base, lora_a, lora_b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, bias = base.weight, base.bias
    return lambda x: fastadapt.lora_linear(x, weight, bias, lora_a, lora_b, scale=1.0, dropout_p=dropout_p)


def _blocks(
    layers: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    grad: torch.Tensor,
    blocks: int,
    steps: int,
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(blocks):
        for name, layer in layers.items():
            start = time.perf_counter()
            for _ in range(steps):
                layer(x).backward(grad)
            times[name].append((time.perf_counter() - start) / steps)
    return times
