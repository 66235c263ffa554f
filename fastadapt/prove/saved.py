"""Bytes that autograd keeps for the backward: exact and deterministic on every device, the meta device included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps when `run` runs a forward pass.

    A storage counts once however many tensors or operations share it; those of `exclude` (parameters, buffers,
    inputs) do not count.  Exact and deterministic on every device, the meta device included.
    """
    return saved_by_label(run, exclude, lambda: "").total()


def saved_by_label(run: Callable[[], Any], exclude: Iterable[Tensor], label: Callable[[], str]) -> Counter[str]:
    """The same, each storage counted under what `label` says when it is first kept."""
    # a storage is known by its address; holding it keeps the address from being reused before the count is done
    excluded = {address(tensor): tensor for tensor in exclude}
    kept: dict[int, tuple[torch.UntypedStorage, str]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (found := address(tensor)) not in excluded and found not in kept:
            kept[found] = tensor.untyped_storage(), label()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    sizes: Counter[str] = Counter()
    for storage, name in kept.values():
        sizes[name] += storage.nbytes()
    del outputs  # the graph lived until here, as it does until a backward
    return sizes


def address(tensor: Tensor) -> int:
    """What identifies the storage of a tensor while it lives."""
    return tensor.untyped_storage()._cdata
