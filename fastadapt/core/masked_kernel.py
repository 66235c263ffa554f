"""`fastadapt.core.philox.masked` as one Triton kernel; torch's own operations would be some 170."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadapt.core.device_math import keep_tile
from fastadapt.core.launch import launch

ROWS, COLUMNS = 8, 256  # a thread of four warps draws eight neighbouring numbers twice and moves 16 bytes at a time


@triton.jit
def masked_kernel(x, seed, y, rows, columns, threshold, member, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x where dropout's mask keeps the element, zero elsewhere; both contiguous (rows, columns)."""
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % column_tiles * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    keep = keep_tile(tl.load(seed), row, first, member, threshold, COLUMNS)
    tl.store(y + at, tl.where(keep, tl.load(x + at, mask=inside), 0.0), mask=inside)


def masked(x: Tensor, seed: Tensor, threshold: int, member: int) -> Tensor:
    """x (rows, columns) where the mask keeps, zero elsewhere."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = x.shape
    grid = (-(-rows // ROWS) * -(-columns // COLUMNS),)
    arguments = x, seed, y, rows, columns, threshold, member
    launch(masked_kernel, grid, *arguments, device=x.device, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return y
