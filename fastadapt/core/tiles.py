"""What the tile configurations of several operations share: sizes of blocks, kinds of GPU, precision of float32 products."""

from __future__ import annotations

import torch

HOPPER_AND_LATER = (90, 100, 103)  # the accumulator of wgmma and tcgen05 leaves room that mma's fragments take
SMALL_SHARED_MEMORY = (86, 89, 120)  # compute capabilities with 99 KiB a block


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size` and `least`; 16 is what a tensor-core product needs."""
    return max(least, 1 << (size - 1).bit_length())


def precision() -> str:
    """Triton's input_precision for float32, which torch's own setting governs; 16-bit operands ignore it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def exact(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are float32's own, on the plain cores."""
    return dtype is torch.float32 and precision() == "ieee"
