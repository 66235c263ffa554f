"""side_fusion in CUDA C++ (csrc/side_fusion_cuda.cu), and which calls its kernels take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastadapt.kernels.side_fusion import native_kernel
from fastadapt.kernels.side_fusion.reference import EACH, Operands

# csrc/side_fusion_device.cuh's kMaxAdapters, kMaxBases, kMaxWidth and kHidden
MAX_ADAPTERS, MAX_BASES, MAX_WIDTH, MAX_HIDDEN = 16, 4, 768, 128
DTYPES = (torch.float16, torch.bfloat16)


def why_not(tensors: Sequence[Tensor | None], base_count: int) -> list[str]:
    """Every reason why the kernels do not take a call of these dtypes and sizes; empty if they do."""
    return list(dict.fromkeys(_reasons(tensors, base_count)))


def _reasons(tensors: Sequence[Tensor | None], base_count: int) -> Iterator[str]:
    dtype, count = tensors[base_count].dtype, (len(tensors) - base_count) // EACH
    if dtype not in DTYPES:
        yield f"taps are {dtype}, kernels exist for float16 and bfloat16"
    if any(tensor is not None and tensor.dtype not in (dtype, torch.float32) for tensor in tensors):
        yield f"a tensor is neither {dtype} nor float32"
    if count > MAX_ADAPTERS:
        yield f"{count} adapters, kernels take at most {MAX_ADAPTERS}"
    if base_count > MAX_BASES:
        yield f"{base_count} bases, kernels take at most {MAX_BASES}"
    for start in range(base_count, len(tensors), EACH):
        call = Operands(*tensors[start : start + EACH])
        if not call.ups:
            yield "an adapter has no up-projection"
        for name, width in (("tap", call.tap.shape[-1]), ("result", call.width)):
            if width % 8 or width > MAX_WIDTH:
                yield f"a {name} is {width} wide, kernels take multiples of 8 up to {MAX_WIDTH}"
        if call.down_weight.shape[0] > MAX_HIDDEN:
            yield f"a hidden layer is {call.down_weight.shape[0]} wide, kernels take at most {MAX_HIDDEN}"
        if call.tap.numel() // call.tap.shape[-1] >= 2**31:
            yield "the taps have 2^31 rows or more"


def forward(tensors: Sequence[Tensor | None], *options: Sequence | int) -> list[Tensor]:
    """`reference.forward`, in two launches."""
    return native_kernel.forward(_resolved(tensors), *options)


def backward(
    saved: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool], *options: Sequence | int
) -> list[Tensor]:
    """`reference.backward`, in four launches."""
    return native_kernel.backward(_resolved(saved), _resolved(grads), needs, *options)


def _resolved(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The kernels see memory, not a lazy negation."""
    return [tensor.resolve_neg() if tensor is not None else None for tensor in tensors]
