"""What GPUs can do at most, as their makers say."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastadapt.core.checks import fail


class Gpu(NamedTuple):
    """Bytes of memory and bytes a second; operations a second of dense tensor cores in 16 bits and TF32, and of float32."""

    memory: float
    bandwidth: float
    half: float
    tf32: float
    float32: float

    def rate(self, dtype: torch.dtype, convolution: bool) -> float:
        """Operations a second as PyTorch computes by default: convolutions of float32 in TF32, products of it not."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.half
        return self.tf32 if convolution else self.float32


# from NVIDIA's data sheets, without sparsity
GPUS = {
    "A100": Gpu(80e9, 2.039e12, 312e12, 156e12, 19.5e12),
    "H100": Gpu(80e9, 3.35e12, 989.5e12, 494.7e12, 66.9e12),
    "H200": Gpu(141e9, 4.8e12, 989.5e12, 494.7e12, 66.9e12),
    "B200": Gpu(180e9, 8.0e12, 2250e12, 1125e12, 75e12),
    "L40S": Gpu(48e9, 0.864e12, 362e12, 183e12, 91.6e12),
    "RTX 4090": Gpu(24e9, 1.008e12, 165.2e12, 82.6e12, 82.6e12),
}


def gpu(name: str) -> Gpu:
    """The GPU of this name, in whatever case."""
    found = {known.lower(): value for known, value in GPUS.items()}
    if name.lower() not in found:
        fail("gpu", f"one of {', '.join(GPUS)}", repr(name))
    return found[name.lower()]
