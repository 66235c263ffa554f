"""What cases of several kinds share: token counts, precisions, the seed that everything random starts from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fastadapt.prove import meta

SEED = 0
VIT, DINO = 32 * 197, 32 * 1370  # tokens of a batch of 32 images at 224 and 518 pixels
REDUCED = 2 * 197  # rows that a CPU can measure in reasonable time

# dtype of inputs and weights, and autocast's
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def sizes(precision: str) -> tuple[int, int]:
    """Bytes of an element of the activations, and of one of the weights."""
    dtype, autocast = PRECISIONS[precision]
    return (autocast or dtype).itemsize, dtype.itemsize


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to `dtype` on this device, or nothing where there is none."""
    if dtype is None:
        return nullcontext()
    return meta.autocast(dtype) if device.type == "meta" else torch.autocast(device.type, dtype)
