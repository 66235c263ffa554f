"""What this machine can do at most, measured in the run that it judges: copy bandwidth and matrix-product rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

REPEATS = 7
_SIZES = {"cuda": (1 << 30, 8192), "cpu": (1 << 27, 2048)}  # bytes copied, edge of the square matrices
_DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32, torch.bfloat16)}


def measure(device: torch.device) -> dict[str, float]:
    """{'copy_bytes_per_s': ..., 'float32_flops_per_s': ..., ...}: the best of REPEATS, on random data.

    A copy of n bytes moves 2 n: it reads and it writes.
    """
    size, edge = _SIZES[device.type]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * size / _best(lambda: target.copy_(source), device)}
    for dtype in _DTYPES[device.type]:
        a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
        seconds = _best(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        found[f"{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * edge**3 / seconds
    return found


def roofline(flops: float, bytes_min: float, dtype: torch.dtype, ceilings: Mapping[str, float]) -> float:
    """Seconds below which no implementation gets: the larger of arithmetic and traffic at the measured ceilings."""
    rate = ceilings[f"{str(dtype).removeprefix('torch.')}_flops_per_s"]
    return max(flops / rate, bytes_min / ceilings["copy_bytes_per_s"])


def _best(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    wait()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
