"""A GPU's training step without a GPU: the operations a CUDA device would run, dispatched on the meta device.

PyTorch chooses dropout and attention implementations by device, and on meta it takes neither of CUDA's.  Inside
`as_on_cuda` a meta model runs CUDA's: dropout in one kernel with a bool mask, attention that keeps no attention map,
fastadapt's Triton kernels (recorded, not run).  Shapes, dtypes, saved tensors and launches are then those of the GPU;
there are no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastadapt.core import backend


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Run meta tensors through dropout, attention and fused operations as if they were on a CUDA device."""
    with (
        mock.patch("torch.nn.functional.dropout", _dropout),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        mock.patch.object(backend, "ACCELERATORS", ("cuda", "meta")),
    ):
        yield


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
    if attn_mask is not None or enable_gqa:
        raise NotImplementedError(
            "attention on the meta device: only what the fused kernels take, without mask or grouped heads"
        )
    if query.dtype == torch.float32:  # flash attention takes 16-bit dtypes alone
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
