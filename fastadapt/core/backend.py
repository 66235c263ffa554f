"""Which implementation runs a call: chosen once, never silently."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastadapt import native
from fastadapt.core.launch import arch_of, interpreting

BACKENDS = ("reference", "native", "triton")
ACCELERATORS = ("cuda",)  # device types on which Triton is the ordinary choice
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.float16, torch.bfloat16)


class BackendError(RuntimeError):
    """The backend that was asked for, or that strict mode insists on, cannot run this call."""


@lru_cache(maxsize=1)
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Every reason why Triton kernels cannot run on tensors of this device and dtype; empty if they can."""
    reasons = []
    if not _triton_installed():
        reasons.append("triton is not installed")
    if device.type == "cpu" and not interpreting():
        reasons.append("x is on the CPU and TRITON_INTERPRET=1 is not set")
    elif device.type not in ("cpu", "cuda", "meta"):
        reasons.append(f"x is on {device.type}")
    elif device.type == "cuda" and arch_of(device) < 80:
        reasons.append(f"the GPU has compute capability {arch_of(device) / 10}, at least 8.0 is needed")
    if dtype not in TRITON_DTYPES:
        reasons.append(f"x is {dtype}, kernels exist for float32, float16 and bfloat16")
    return reasons


@lru_cache(maxsize=None)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def why_not_native(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Every reason why the C++ CPU kernels cannot run on tensors of this device and dtype; empty if they can."""
    reasons = [] if native.load() else ["the C++ library is not built (python -m fastadapt.native builds it)"]
    return reasons if device.type == "cpu" else [*reasons, f"x is on {device.type}"]


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Every reason why the CUDA C++ kernels cannot run on tensors of this device and dtype; empty if they can."""
    reasons = [reason] if (reason := native.cuda_reason()) else []
    if device.type != "cuda":
        reasons.append(f"x is on {device.type}")
    if dtype not in CUDA_DTYPES:
        reasons.append(f"x is {dtype}, kernels exist for float16 and bfloat16")
    return reasons


WHY_NOT = {
    "reference": lambda device, dtype: [],
    "native": why_not_native,
    "triton": why_not_triton,
    "cuda": why_not_cuda,
}


def choose(
    operation: str,
    requested: str | None,
    x: Tensor,
    backends: Sequence[str] = BACKENDS,
    reasons: Sequence[str] = (),
    cuda_reasons: Sequence[str] = (),
) -> str:
    """The backend for a call of `operation` on x: the one requested, else CUDA C++ or Triton on a GPU, C++ on a CPU, or the
    reference.

    backends: those that the operation has; reasons, cuda_reasons: why Triton and CUDA C++ cannot run this call, beyond its
    device and dtype.  A requested backend that cannot run raises BackendError with every reason.  On a CPU without C++ for the
    operation the reference is the ordinary path, and so is Triton on a GPU for a call that CUDA C++ does not take.  An
    automatic choice that falls back from Triton on a GPU warns once a reason, and raises under FASTADAPT_STRICT=1.
    """
    device = x.device
    if requested is None and device.type == "cpu":
        return "native" if "native" in backends and native.load() else "reference"
    if requested not in (None, *backends):
        raise ValueError(f"backend: expected None or one of {', '.join(backends)}, got {requested!r}")
    if requested is None and device.type not in ACCELERATORS:
        return "reference"
    # asked first whether it is loaded: looking for why not takes long, and torch.compile cannot trace it
    cuda = "cuda" in backends and native.status().cuda and not cuda_reasons and not why_not_cuda(device, x.dtype)
    wanted = requested or ("cuda" if cuda else "triton")
    of_call = {"triton": reasons, "cuda": cuda_reasons}
    reasons = [*WHY_NOT[wanted](device, x.dtype), *of_call.get(wanted, ())]
    if not reasons:
        return wanted
    message = f"{operation}: the {wanted} backend cannot run: {'; '.join(reasons)}"
    if requested or os.environ.get("FASTADAPT_STRICT") == "1":
        raise BackendError(message)
    _warn_once(f"{message}. The reference runs instead.")
    return "reference"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would compute with on x, None where it is off; as in torch, float64 is left alone.

    A tensor on the meta device follows the CPU's autocast, which a machine without a GPU can switch.
    """
    kind = x.device.type
    if kind == "meta":
        kind = "cpu"
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return None
