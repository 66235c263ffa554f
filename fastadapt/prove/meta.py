"""A GPU's training step without a GPU: the operations a CUDA device would run, dispatched on the meta device.

PyTorch chooses dropout and attention implementations by device, and on meta it takes neither of CUDA's, and has no autocast.
Inside `as_on_cuda` a meta model runs CUDA's: dropout in one kernel with a bool mask, attention that keeps no attention map,
fastadapt's Triton kernels (recorded, not run).  Shapes, dtypes, saved tensors and launches are then those of the GPU;
there are no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastadapt.core import backend

# What CUDA's autocast does to the functions that models call, by the place where they look them up: the argument that decides
# the dtype comes first.  https://docs.pytorch.org/docs/stable/amp.html lists them all.
_LOWER = (
    "torch.nn.functional.linear",
    "torch.nn.functional.conv1d",
    "torch.nn.functional.conv2d",
    "torch.nn.functional.conv_transpose2d",
    "torch.matmul",
    "torch.mm",
    "torch.bmm",
    "torch.addmm",
    "torch.baddbmm",
    "torch.einsum",
    "torch.Tensor.__matmul__",
    "torch.Tensor.matmul",
    "torch.Tensor.bmm",
)
_FLOAT32 = (
    "torch.nn.functional.layer_norm",
    "torch.nn.functional.softmax",
    "torch.nn.functional.log_softmax",
    "torch.nn.functional.normalize",
    "torch.nn.functional.l1_loss",
    "torch.nn.functional.mse_loss",
    "torch.nn.functional.cross_entropy",
    "torch.nn.functional.binary_cross_entropy_with_logits",
    "torch.softmax",
    "torch.exp",
    "torch.Tensor.softmax",
    "torch.Tensor.exp",
    "torch.Tensor.pow",
    "torch.Tensor.sum",
    "torch.Tensor.prod",
    "torch.Tensor.cumsum",
)


@contextmanager
def as_on_cuda(triton: bool = True) -> Iterator[None]:
    """Run meta tensors through dropout, attention and fused operations as if they were on a CUDA device.

    triton: whether fastadapt's operations take their kernels, rather than their reference in plain torch.
    """
    with ExitStack() as patches:
        patches.enter_context(mock.patch("torch.nn.functional.dropout", _dropout))
        patches.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        if triton:
            patches.enter_context(mock.patch.object(backend, "ACCELERATORS", ("cuda", "meta")))
        yield


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """CUDA's autocast to `dtype` for tensors on the meta device; float32 is no autocast.  Enter it inside `as_on_cuda`."""
    if dtype == torch.float32:
        yield
        return
    casts = {name: dtype for name in (*_LOWER, "torch.nn.functional.scaled_dot_product_attention")}
    casts |= {name: torch.float32 for name in _FLOAT32}
    with ExitStack() as patches:
        patches.enter_context(torch.autocast("cpu", dtype))  # which fastadapt's operations look at
        for name, wanted in casts.items():
            owner, attribute = name.rsplit(".", 1)
            original = getattr(_found(owner), attribute)
            patches.enter_context(mock.patch(name, _casting(original, wanted)))
        yield


def _casting(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if floating else value

    @wraps(function)
    def casting(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return casting


def _found(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise NotImplementedError("attention on the meta device: only what the fused kernels take, without grouped heads")
    if query.dtype == torch.float32 or attn_mask is not None:  # flash attention takes 16-bit dtypes alone, and no mask
        mask = None if attn_mask is None else _expanded_mask(attn_mask, query, key)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


def _expanded_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the kernel is given it: of the query's dtype, a view of all heads and queries that it is broadcast over."""
    if mask.dtype == torch.bool:
        mask = torch.empty_like(mask, dtype=query.dtype)
    return mask.expand(*query.shape[:-1], key.shape[-2])
