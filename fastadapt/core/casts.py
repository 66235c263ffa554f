"""Frozen tensors in the dtype they are computed with, cast once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

_casts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frozen_cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` itself where it has this dtype, else a copy that is made at the first call and lives as long as the tensor does.

    A tensor that was changed, moved or given other memory since is cast anew; a write through `.data` into the same memory
    leaves no trace, and wants `forget`.  A tensor that requires a gradient or was made in inference mode, and a call that is
    being compiled, get a plain cast.
    """
    if tensor is None or tensor.dtype is dtype:
        return tensor
    if torch.compiler.is_compiling() or tensor.requires_grad or tensor.is_inference():
        return tensor.to(dtype)
    storage = tensor.untyped_storage()
    state = (storage._cdata, tensor.data_ptr(), tensor._version)
    held = _casts.setdefault(tensor, {})
    if dtype not in held or held[dtype][0] != state:
        with torch.inference_mode(False), torch.no_grad():
            # the reference keeps no memory, but no other storage can have this one's address while it lives
            held[dtype] = (state, tensor.to(dtype), StorageWeakRef(storage))
    return held[dtype][1]


def forget(tensors: Iterable[Tensor]) -> None:
    """Cast these anew when they are next read."""
    for tensor in tensors:
        _casts.pop(tensor, None)
