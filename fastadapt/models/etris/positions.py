"""Position embeddings of square maps, for maps of another size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resized(positions: Tensor, size: Sequence[int]) -> Tensor:
    """(1 + H W, C) for maps of this size (H, W), from (1 + n n, C): the first row as it is, the others bicubically."""
    first, places = positions[:1], positions[1:]
    side = math.isqrt(len(places))
    if (side, side) == tuple(size):
        return positions
    grid = places.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, tuple(size), mode="bicubic", align_corners=False)
    return torch.cat([first, grid[0].flatten(1).T])
