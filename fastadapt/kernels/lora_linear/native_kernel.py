"""LoRA linear in C++ (csrc/lora_linear.cpp): the reference's computation and results, with less of the host's time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.core.philox import threshold
from fastadapt.kernels.lora_linear import reference


def apply(tensors: Sequence[Tensor | None], scales: Sequence[float], dropout_p: float) -> list[Tensor]:
    """The whole operation, differentiable without Python in between (csrc/lora_linear_autograd.cpp)."""
    return torch.ops.fastadapt_native.lora_linear(tensors, scales, threshold(dropout_p))


def forward(tensors: Sequence[Tensor | None], scales: Sequence[float], dropout_p: float) -> list[Tensor]:
    """`reference.forward`; below autograd, which is the caller's affair."""
    with torch._C._AutoDispatchBelowAutograd():
        return apply(tensors, scales, dropout_p)


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    scales: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    """`reference.backward`, which runs itself where the gradient of a low-rank product is given."""
    if any([ds is not None for ds in grads[len(scales) :]]):
        return reference.backward(saved, grads, needs, scales, dropout_p)
    return torch.ops.fastadapt_native.lora_linear_backward(saved, grads, needs, scales, threshold(dropout_p))


def _forward_fake(tensors: Sequence[Tensor | None], scales: Sequence[float], threshold: int) -> list[Tensor]:
    return reference.forward(tensors, scales, threshold / 65536)


if native.load():
    torch.library.register_fake("fastadapt_native::lora_linear", _forward_fake)
