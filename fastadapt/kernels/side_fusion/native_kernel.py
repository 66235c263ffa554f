"""side_fusion in C++ (csrc/side_fusion.cpp): the reference's computation on blocks of rows that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.kernels.side_fusion import reference

_OPTIONS = "int base_count, int[] activations, float[] scales, float[] norm_eps, float[] out_norm_eps"
# the operators of torch.ops.fastadapt_native, whatever the device; csrc/library.cpp declares them
SCHEMAS = {
    "side_fusion": f"(Tensor?[] tensors, {_OPTIONS}) -> Tensor[]",
    "side_fusion_backward": f"(Tensor?[] saved, Tensor?[] grads, bool[] needs, {_OPTIONS}) -> Tensor[]",
}
# an activation is a number there: the stable ABI never frees the strings of a list
_NAMES = tuple(reference.ACTIVATIONS)


def forward(
    tensors: Sequence[Tensor | None], base_count: int, activations: Sequence[str], *numbers: Sequence[float]
) -> list[Tensor]:
    """`reference.forward`, of the same arguments."""
    codes = [_NAMES.index(name) for name in activations]
    return torch.ops.fastadapt_native.side_fusion(tensors, base_count, codes, *numbers)


def backward(
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    base_count: int,
    activations: Sequence[str],
    *numbers: Sequence[float],
) -> list[Tensor]:
    """`reference.backward`, of the same arguments."""
    codes = [_NAMES.index(name) for name in activations]
    return torch.ops.fastadapt_native.side_fusion_backward(saved, grads, needs, base_count, codes, *numbers)


def _forward_fake(tensors: list, base_count: int, activations: Sequence[int], *numbers: Sequence[float]) -> list[Tensor]:
    return reference.forward(tensors, base_count, [_NAMES[code] for code in activations], *numbers)


def _backward_fake(saved: list, grads: list, needs: Sequence[bool], base_count: int, *options: Sequence) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(saved, needs) if need]


if native.load():
    torch.library.register_fake("fastadapt_native::side_fusion", _forward_fake)
    torch.library.register_fake("fastadapt_native::side_fusion_backward", _backward_fake)
