"""Where the one kernel serves, where it pays, and which tiles it has: functions of numbers, tested without a GPU.

What is compared is a model of an H200, not a measurement; README.md has the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastadapt.core.launch import arch_of, processors
from fastadapt.core.tiles import SMALL_SHARED_MEMORY, exact, padded

KERNEL_SIZES = (3, 5, 7)
WIDEST_HIDDEN, WIDEST_CROWDED = 256, 128  # wider ones do not stay on chip behind the convolution
MOST_REACH = 4  # tiles on either side that a tile waits for: each is an atomic more in every program


@dataclass(frozen=True)
class Problem:
    """What the choice depends on: rows, and widths as in x (rows, depth), u (rows, h), y (rows, width).

    reach: rows between a token and the furthest that its convolution reads; itemsize: bytes of x's elements; exact: float32
    without TF32; arch: compute capability; processors: multiprocessors.
    """

    rows: int
    depth: int
    h: int
    width: int
    reach: int
    itemsize: int
    exact: bool
    arch: int
    processors: int = 132

    @property
    def crowded(self) -> bool:
        """Whether float32, or rows that Triton loads an element at a time, take the registers."""
        return self.itemsize == 4 or any(size % 16 for size in (self.depth, self.h, self.width))


def problem(
    rows: int,
    depth: int,
    h: int,
    width: int,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """The Problem of a call computed in `dtype` on this device, under torch's present float32_matmul_precision."""
    down, right = (min(size // 2 * dilation, side - 1) for size, side in zip(kernel, grid))
    reach = down * grid[1] + right
    return Problem(rows, depth, h, width, reach, dtype.itemsize, exact(dtype), arch_of(device), processors(device))


def algorithm(problem: Problem) -> str:
    """How a forward pass runs.

    "fused":   one kernel; u is in memory, but read from L2.
    "library": the reference's products and convolution by cuBLAS and cuDNN: a hidden too wide to stay on chip, taps that reach
               over too many tiles, and exact float32, whose plain cores take longer than the passes over memory that one
               kernel saves.
    """
    fits = padded(problem.h) <= (WIDEST_CROWDED if problem.crowded else WIDEST_HIDDEN)
    return "fused" if fits and tile_reach(problem) <= MOST_REACH and not problem.exact else "library"


def pays(problem: Problem, gradients: bool) -> bool:
    """Whether the operation is predicted to beat its parts: projections by cuBLAS around local_dwconv.

    |              | fused                              | library                            |
    | no gradients | yes: the hidden crosses memory     | no: local_dwconv beats the         |
    |              | once instead of six times          | library's depthwise convolution    |
    | gradients    | no: the backward is the library's, and has a depthwise convolution too  |
    """
    return not gradients and algorithm(problem) == "fused"


@dataclass(frozen=True)
class Tiles:
    """Rows of a program, columns of its steps along x and y, taps that are in flight together, and Triton's launch options."""

    rows: int
    columns: int
    unroll: int
    num_warps: int
    num_stages: int


def tiles(problem: Problem) -> Tiles:
    """Tiles of adapter_kernel: as many rows as keep every multiprocessor busy and few tiles within reach."""
    if problem.crowded:
        return Tiles(32, 32, 1, 8, 2)
    h, stages = padded(problem.h), 2 if problem.arch in SMALL_SHARED_MEMORY else 3
    if problem.rows <= 16 * problem.processors and problem.reach <= 16 * MOST_REACH:
        return Tiles(16, 64, 3, 8 if h > 128 else 4, stages)
    return Tiles(32, 32, 3, 8, stages) if h > 128 else Tiles(64, 64, 3, 8, stages)


def tile_reach(problem: Problem) -> int:
    """How many tiles on either side of a tile its convolution reads."""
    return -(-problem.reach // tiles(problem).rows)
