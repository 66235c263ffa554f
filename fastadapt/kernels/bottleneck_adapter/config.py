"""Which tiles serve a shape: functions of numbers, tested without a GPU.

What is compared is a model of an H200, not a measurement; README.md has the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastadapt.core.launch import arch_of, processors
from fastadapt.core.tiles import HOPPER_AND_LATER, SMALL_SHARED_MEMORY, exact, padded

# the widest hidden that stays on chip: in 16 bits, in TF32, and on the plain cores, which hold whole tiles in registers
WIDEST_HIDDEN = {"16 bits": 256, "tf32": 128, "exact": 64}
FEW_ROWS = 4096  # below it launches cost more than exact float32's slow products


@dataclass(frozen=True)
class Problem:
    """What the choice depends on: rows, and widths as in x (rows, depth), hidden (rows, h), y (rows, width).

    itemsize: bytes of x's elements; weight_itemsize: of the weights'; exact: float32 without TF32; arch: compute capability; processors: multiprocessors.
    """

    rows: int
    depth: int
    width: int
    h: int
    itemsize: int
    weight_itemsize: int
    exact: bool
    arch: int
    processors: int = 132


def problem(
    rows: int, depth: int, width: int, h: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> Problem:
    """The Problem of a call computed in `dtype` on this device, under torch's present float32_matmul_precision."""
    sizes = dtype.itemsize, weight_dtype.itemsize
    return Problem(rows, depth, width, h, *sizes, exact(dtype), arch_of(device), processors(device))


@dataclass(frozen=True)
class Tiles:
    """Rows of a program, columns of its steps, and Triton's launch options."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def algorithm(problem: Problem) -> str:
    """How a call runs.

    "fused":   one kernel forward and two backward, the hidden on chip.
    "library": the reference's products by cuBLAS, where the hidden is too wide, and in exact float32, whose plain cores
               take longer than the passes over memory that fusing saves.
    """
    kind = "exact" if problem.exact else "tf32" if problem.itemsize == 4 else "16 bits"
    if padded(problem.h) > WIDEST_HIDDEN[kind] or (problem.exact and problem.rows >= FEW_ROWS):
        return "library"
    return "fused"


def row_tiles(problem: Problem) -> Tiles:
    """Tiles of forward_kernel: as many rows as keep every multiprocessor busy."""
    hidden = padded(problem.h)
    if problem.itemsize == 4:
        return Tiles(32, 32, 4, 2)
    if problem.depth % 16 or problem.width % 16 or problem.h % 16:  # then Triton loads rows an element at a time
        return Tiles(32, 32, 4, 2)
    if problem.rows <= 16 * problem.processors:
        return Tiles(16, 64, 4, 3)
    stages = 2 if problem.arch in SMALL_SHARED_MEMORY else 3
    if problem.rows <= 64 * 2 * problem.processors or hidden > 128:
        # weights that are cast where they are loaded pass through registers
        warps = 4 if hidden <= 64 and problem.weight_itemsize == problem.itemsize else 8
        return Tiles(64, 64 if hidden <= 128 else 32, warps, stages)
    return Tiles(128, 64, 8, stages)


def grad_tiles(problem: Problem) -> Tiles:
    """Tiles of hidden_grad_kernel: those of the forward, with fewer rows where activation, slope and LayerNorm crowd a wide hidden."""
    tiles = row_tiles(problem)
    return replace(tiles, rows=min(tiles.rows, 32)) if padded(problem.h) > 128 else tiles


def weight_tiles(problem: Problem) -> Tiles:
    """Tiles of weight_grad_kernel: (rows a step, columns of x or dy)."""
    hidden = padded(problem.h)
    if problem.itemsize == 4 or problem.depth % 16 or problem.width % 16 or problem.h % 16:
        return Tiles(32, 32, 4 if hidden <= 64 else 8, 2)
    if hidden > 128:
        return Tiles(64, 64 if problem.arch in HOPPER_AND_LATER else 32, 8, 2)
    return Tiles(64, 128 if hidden <= 64 else 64, 8, 2)


def row_splits(problem: Problem, tiles: int, rows: int) -> int:
    """Into how many runs of rows the sums over rows are cut, for this many tiles and rows a step.

    Enough to give every multiprocessor two programs, at most 32 so that the last program of a tile has little to add.
    """
    wanted = -(-2 * problem.processors // max(tiles, 1))
    return max(1, min(wanted, 32, -(-problem.rows // rows)))
