"""Bytes a training step needs: what autograd keeps for the backward, and the allocator's peak."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps when `run` runs a forward pass.

    A storage counts once however many tensors or operations share it; those of `exclude` (parameters, buffers,
    inputs) do not count.  Exact and deterministic on every device, the meta device included.
    """
    # a storage is known by its address; holding it keeps the address from being reused before the count is done
    excluded = {_address(tensor): tensor for tensor in exclude}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (address := _address(tensor)) not in excluded:
            kept[address] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    size = sum(storage.nbytes() for storage in kept.values())
    del outputs  # the graph lived until here, as it does until a backward
    return size


def peak_bytes(run: Callable[[], Any]) -> dict[str, int]:
    """The CUDA allocator's peak while `run` runs, over what was allocated before, and what it then reserves."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - baseline,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
