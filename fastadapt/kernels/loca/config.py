"""Which tiles serve a shape: functions of numbers, tested without a GPU.

What is compared is a model of an H200, not a measurement; README.md has the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastadapt.core.launch import arch_of, processors
from fastadapt.core.tiles import HOPPER_AND_LATER, SMALL_SHARED_MEMORY, exact, padded

# the widest h, t and z2 of which a tile of rows stays on chip
WIDEST_HIDDEN, WIDEST_REDUCED, WIDEST_LOCAL = 320, 32, 128
MOST_SPLITS = 32


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    depth: width of n; out: of the result; itemsize: bytes of n's elements; exact: float32 without TF32; arch: compute
    capability; processors: multiprocessors.
    """

    rows: int
    depth: int
    hidden: int
    reduced: int
    local: int
    out: int
    itemsize: int
    exact: bool
    arch: int
    processors: int = 132

    @property
    def crowded(self) -> bool:
        """Whether float32, rows that Triton loads an element at a time, or a wide second piece take the registers."""
        odd = any(size % 16 for size in (self.depth, self.hidden, self.local, self.out))
        return self.itemsize == 4 or odd or (pieces(self.hidden)[1] > 32 and self.arch not in HOPPER_AND_LATER)


def problem(
    rows: int, depth: int, hidden: int, reduced: int, local: int, out: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """The Problem of a call computed in `dtype` on this device, under torch's present float32_matmul_precision."""
    kind = dtype.itemsize, exact(dtype), arch_of(device), processors(device)
    return Problem(rows, depth, hidden, reduced, local, out, *kind)


def algorithm(problem: Problem) -> str:
    """How a call runs.

    "fused":   three kernels forward, in eval one, and seven backward, whose rows of h stay on chip.
    "library": the reference's products by cuBLAS and cuDNN, where widths are too large, and in exact float32, whose plain
               cores take longer than the passes over memory that fusing saves.
    """
    fits = problem.hidden <= WIDEST_HIDDEN and problem.reduced <= WIDEST_REDUCED and problem.local <= WIDEST_LOCAL
    return "fused" if fits and not problem.exact else "library"


@dataclass(frozen=True)
class Tiles:
    """Rows of a program, depth of its steps along a long sum, columns of its other steps, and Triton's launch options."""

    rows: int
    depth: int
    columns: int
    num_warps: int
    num_stages: int


def pieces(hidden: int) -> tuple[int, int]:
    """FIRST and REST, the two powers of two that hold the bottleneck's columns: 256 and 32 for 288."""
    first = max(16, padded(hidden) // 2)
    return first, padded(max(hidden - first, 1))


def hidden_tiles(problem: Problem) -> Tiles:
    """Tiles of hidden_kernel and output_grad_kernel, which hold whole rows of the bottleneck."""
    if problem.crowded:
        return Tiles(16, 16, 32, 4, 1)
    if problem.arch in HOPPER_AND_LATER:
        return Tiles(128, 64, 64, 8, 3)
    return Tiles(64, 16, 32, 8, 4)  # every warp holds a whole step of the weight


def inference_tiles(problem: Problem) -> Tiles:
    """Tiles of inference_kernel, which holds h as an operand, and takes twice as many columns of out a step as of u."""
    if problem.crowded:
        return Tiles(16, 32, 16, 4, 1)
    if problem.arch in HOPPER_AND_LATER:
        return Tiles(128 if problem.arch == 90 else 64, 64, 32, 8, 3)
    return Tiles(64, 16, 32, 8, 3)


def hidden_grad_tiles(problem: Problem) -> Tiles:
    """Tiles of hidden_grad_kernel, which also holds what comes before the batch norms."""
    if problem.crowded:
        return Tiles(16, 16, 32, 4, 1)
    if problem.arch in HOPPER_AND_LATER:
        return Tiles(64, 32, 128, 8, 3)
    return Tiles(16, 16, 64, 4, 3) if problem.arch in SMALL_SHARED_MEMORY else Tiles(32, 16, 64, 8, 3)


def local_tiles(problem: Problem) -> Tiles:
    """Tiles of local_kernel and local_grad_kernel."""
    if problem.crowded:
        return Tiles(16, 32, 32, 4, 1)
    return Tiles(32, 32, 32, 4, 1) if problem.arch in SMALL_SHARED_MEMORY else Tiles(64, 32, 32, 8, 1)


def output_tiles(problem: Problem) -> Tiles:
    """Tiles of output_kernel."""
    return Tiles(32, 32, 64, 4, 1) if problem.crowded else Tiles(128, 32, 128, 8, 2)


def weight_tiles(problem: Problem) -> Tiles:
    """Tiles of the kernels of weights' gradients: rows of a step, and columns of the left (depth) and the right operand."""
    if problem.crowded:
        return Tiles(32, 32, 64, 4, 1)
    return Tiles(64, 64, 128, 8, 3) if problem.arch in HOPPER_AND_LATER else Tiles(32, 64, 128, 8, 4)


def row_splits(problem: Problem, tiles: int, rows: int) -> int:
    """Into how many runs of rows the sums over rows are cut, for this many tiles and rows a step.

    Enough to give every multiprocessor two programs, but few enough for the last program of a tile to have little to add.
    """
    wanted = -(-2 * problem.processors // max(tiles, 1))
    return max(1, min(wanted, MOST_SPLITS, -(-problem.rows // rows)))
