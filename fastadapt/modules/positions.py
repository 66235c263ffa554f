"""Constant tables of positions, made once and kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Table:
    """A constant tensor that depends on a size: made the first time it is asked for, kept for each size, dtype and device.

    make: make(*size, dtype, device) returns the tensor.

    Call it with the size and, as `like`, a tensor whose dtype and device the table takes.  Tables are part of no state dict.
    Under torch.compile, and for a `like` that is no plain tensor, the table is made anew, as part of what is traced.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make = make
        self.made: dict[tuple, Tensor] = {}

    def __call__(self, *size: int, like: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(like) is not Tensor:
            return self.make(*size, like.dtype, like.device)
        key = (*size, like.dtype, like.device)
        if key not in self.made:
            # one made in inference mode would be of no use to training later
            with torch.inference_mode(False):
                self.made[key] = self.make(*size, like.dtype, like.device)
        return self.made[key]


def coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 2, height, width): the column x and the row y of each place, evenly from -1 to 1 (Liu et al., "CoordConv", 2018)."""
    x, y = (torch.linspace(-1, 1, size, dtype=dtype, device=device) for size in (width, height))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def sine_positions(length: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, channels), channels even: sines and cosines in turn of the position.

        P[t, 2i] = sin(t / 10000^(2i / channels)),      P[t, 2i + 1] = cos(t / 10000^(2i / channels))

    (Vaswani et al., "Attention Is All You Need", 2017, section 3.5), computed in float32, or float64 where that is the dtype.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = torch.exp(torch.arange(0, channels, 2, dtype=wide, device=device) * (-math.log(10000) / channels))
    angle = torch.arange(length, dtype=wide, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(dtype)


def sine_positions_2d(height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(height width, channels), channels a multiple of 4: places row by row; half the channels for the column, then the row.

    P[y width + x] = [sine_positions[x], sine_positions[y]], each with channels / 2.
    """
    x, y = (sine_positions(size, channels // 2, dtype, device) for size in (width, height))
    return torch.cat([x.expand(height, -1, -1), y[:, None].expand(-1, width, -1)], dim=-1).flatten(0, 1)
