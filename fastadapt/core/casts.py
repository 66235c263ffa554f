"""Frozen tensors in the dtype they are computed with, cast once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_casts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frozen_cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` itself where it has this dtype, else a copy that is made at the first call and lives as long as the tensor does.

    A tensor that was changed or moved since is cast anew.  A tensor that requires a gradient or was made in inference mode,
    and a call that is being compiled, get a plain cast.
    """
    if tensor is None or tensor.dtype is dtype:
        return tensor
    if torch.compiler.is_compiling() or tensor.requires_grad or tensor.is_inference():
        return tensor.to(dtype)
    state = (tensor.data_ptr(), tensor._version, tensor.device)
    held = _casts.setdefault(tensor, {})
    if dtype not in held or held[dtype][0] != state:
        with torch.inference_mode(False), torch.no_grad():
            held[dtype] = (state, tensor.to(dtype))
    return held[dtype][1]
