"""Bytes a training step needs: what autograd keeps for the backward, and the allocator's peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from fastadapt.prove.saved import saved_bytes

__all__ = ["peak_bytes", "saved_bytes"]


def peak_bytes(run: Callable[[], Any]) -> dict[str, int]:
    """The CUDA allocator's peak while `run` runs, over what was allocated before, and what it then reserves."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() - baseline,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }
