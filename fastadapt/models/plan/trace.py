"""Everything that a step dispatches, looked at as it goes by: operations, traffic, live memory, and time at a GPU's limits."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastadapt.models.plan.gpus import Gpu
from fastadapt.prove.saved import address

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach"}


class Trace(TorchDispatchMode):
    """Counts while it is entered.

    given: tensors that are there from the beginning and stay; they are not part of `live`.

    flops: operations of matrix products, convolutions and attention, one multiply-add being two.
    bytes: read and written by every operation that is no view, each tensor once an operation.
    seconds: the sum over operations of what takes the GPU longer, arithmetic or traffic.  Nothing is overlapped, no cache keeps
        anything, and the start of a kernel costs nothing.
    live, peak: bytes of the storages that were made and not yet freed, now and at most.
    """

    def __init__(self, gpu: Gpu, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.gpu = gpu
        self.flops = self.bytes = self.live = self.peak = 0
        self.seconds = 0.0
        self._given = list(given)
        self._known: dict[int, Any] = {address(tensor): None for tensor in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not func.is_view and func._schema.name.rsplit("::", 1)[-1] not in _FREE:
            self._count(func, args, kwargs, out, results)
        for tensor in results:
            self._follow(tensor)
        return out

    def _count(self, func: Any, args: tuple, kwargs: dict, out: Any, results: list[Tensor]) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        flops = 0
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=out)
        convolution = "convolution" in func._schema.name
        self.add(flops, [*read, *results], convolution)
        if func is torch.ops.aten.convolution.default and args[2] is not None:
            self.add(0, results)  # PyTorch adds a bias to cuDNN's result in a pass of its own: read,
            self.add(0, results)  # and written

    def add(self, flops: float, tensors: Iterable[Tensor], convolution: bool = False) -> None:
        """Count one kernel that reads or writes these tensors."""
        once = {(address(t), t.storage_offset(), t.shape): t for t in tensors}.values()
        moved = sum(traffic(tensor) for tensor in once)
        self.flops += flops
        self.bytes += moved
        arithmetic = 0.0
        if flops:
            dtype = next(tensor.dtype for tensor in once if tensor.is_floating_point())
            arithmetic = flops / self.gpu.rate(dtype, convolution)
        self.seconds += max(arithmetic, moved / self.gpu.bandwidth)

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def traffic(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, those that it repeats (stride 0) once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride else 1
    return count * tensor.element_size() if tensor.numel() else 0
