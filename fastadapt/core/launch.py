"""The one place a Triton kernel is started from, and the way to see what would be started without starting it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel start: the @triton.jit function, its grid, its positional arguments and its constexprs and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


_log: list[Launch] | None = None
_log_arguments = True
_assumed_arch = 90


def launch(kernel: Any, grid: Sequence[int], *args: Any, device: torch.device, **meta: Any) -> None:
    """Start `kernel` over `grid` on `device`; on the meta device, record it if asked to and start nothing.

    A grid with a zero in it is an operation on an empty tensor: there is nothing to start.
    """
    grid = tuple(grid)
    if 0 in grid:
        return
    if _log is not None:
        _log.append(Launch(kernel, grid, args if _log_arguments else (), meta))
    if device.type == "meta":
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


@contextmanager
def recording(arguments: bool = True) -> Iterator[list[Launch]]:
    """Collect every kernel start made inside the block, in order; nested blocks each see their own starts.

    arguments: whether a Launch keeps its arguments, and with them the tensors alive.  Autograd copies a gradient that somebody
    else holds, so a backward whose work is counted is to be recorded without them.
    """
    global _log, _log_arguments
    outer, _log = (_log, _log_arguments), []
    _log_arguments = arguments
    try:
        yield _log
    finally:
        if outer[0] is not None:
            outer[0].extend(_log)
        _log, _log_arguments = outer


@contextmanager
def target(arch: int) -> Iterator[None]:
    """Make the configuration functions see compute capability `arch` (80, 90, ...) for tensors that are not on a GPU."""
    global _assumed_arch
    outer, _assumed_arch = _assumed_arch, arch
    try:
        yield
    finally:
        _assumed_arch = outer


@lru_cache(maxsize=None)
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def _gpu(device: torch.device) -> Any:
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


def arch_of(device: torch.device) -> int:
    """Compute capability of `device` as major * 10 + minor; for a device that is no GPU, the one `target` names (90 at first)."""
    if device.type != "cuda":
        return _assumed_arch
    gpu = _gpu(device)
    return 10 * gpu.major + gpu.minor


def gpu_name(device: torch.device) -> str:
    """The GPU's name, such as "NVIDIA H200"; empty for a device that is no GPU."""
    return _gpu(device).name if device.type == "cuda" else ""


def processors(device: torch.device) -> int:
    """Number of multiprocessors; an H200's 132 for a device that is no GPU."""
    return _gpu(device).multi_processor_count if device.type == "cuda" else 132


def interpreting() -> bool:
    """Whether Triton kernels run under its interpreter in this process (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
