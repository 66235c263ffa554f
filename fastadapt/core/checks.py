"""Argument checks: every failure names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(argument: str, expected: str, got: Any) -> None:
    """Raise the ValueError that all checks raise."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(argument: str, value: Any, shape: tuple[int | None, ...], device: torch.device) -> None:
    """`value` is a floating-point tensor of this shape (None matches any size) on this device."""
    if not isinstance(value, Tensor):
        fail(argument, "a tensor", type(value).__name__)
    if value.ndim != len(shape) or any(want is not None and want != size for want, size in zip(shape, value.shape)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        fail(argument, f"shape ({wanted})", f"shape {tuple(value.shape)}")
    if value.dtype not in FLOATS:
        fail(argument, "float32, float16, bfloat16 or float64", value.dtype)
    if value.device != device:
        fail(argument, f"a tensor on {device}, where the others are", f"one on {value.device}")


def check_input(argument: str, value: Any) -> None:
    """`value` is a floating-point tensor of at least one dimension."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.dtype not in FLOATS:
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fail(argument, "a floating-point tensor of at least one dimension", got)


def check_dtype(argument: str, value: Tensor | None, allowed: tuple[torch.dtype, ...]) -> None:
    """`value` is None or has one of these dtypes."""
    if value is not None and value.dtype not in allowed:
        fail(argument, " or ".join(map(str, allowed)), value.dtype)


def check_probability(argument: str, value: Any) -> None:
    """`value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        fail(argument, "a number p with 0 <= p < 1", repr(value))


def check_number(argument: str, value: Any) -> None:
    """`value` is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        fail(argument, "a finite number", repr(value))


def check_heads(argument: str, value: Any, width: int, of: str) -> None:
    """`value` heads share the `width` columns of the tensor `of` evenly."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        fail(argument, "an integer of at least 1", repr(value))
    if width == 0 or width % value:
        fail(argument, f"a divisor of {of}'s width {width}", value)


def check_padding_mask(argument: str, value: Any, shape: tuple[int, int], device: torch.device) -> None:
    """`value` is None or a bool tensor of this shape on this device, as nn.MultiheadAttention's key_padding_mask."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype is not torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        fail(argument, "None or a bool tensor, True for a key to ignore", got)
    if value.shape != shape:
        fail(argument, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")
    if value.device != device:
        fail(argument, f"a tensor on {device}, where the others are", f"one on {value.device}")
