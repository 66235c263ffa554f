"""Which tiles serve a shape: a pure function of numbers, tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from fastadapt.core.tiles import padded

ELEMENTS = 4096  # of a tile: 32 a thread, which leaves registers for the four tensors that the backward reads
WIDEST = 16384  # a row of LayerNorm stays in the registers of one program


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a program, and its warps."""

    rows: int
    columns: int
    num_warps: int


def tiles(width: int, whole_rows: bool) -> Tiles:
    """Tiles of ELEMENTS; whole_rows: a program needs all columns of its rows, as LayerNorm does."""
    columns = padded(width) if whole_rows else min(padded(width), 1024)
    rows = max(1, ELEMENTS // columns)
    return Tiles(rows, columns, num_warps=max(4, min(16, columns // 1024)))
