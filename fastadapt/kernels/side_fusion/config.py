"""Which tiles serve a shape: functions of numbers, tested without a GPU.

What is compared is a model of an H200, not a measurement; README.md has the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastadapt.core.tiles import SMALL_SHARED_MEMORY, padded

MOST_ADAPTERS = 24  # 5 KiB of kernel parameters, for which CUDA 12.1 made room, and a choice among 24 for every pointer
# the widest hidden that stays on chip: in 16 bits, in TF32, and on the plain cores, which hold whole tiles in registers
WIDEST_HIDDEN = {"16 bits": 256, "tf32": 128, "exact": 64}
FEW_ROWS = 4096  # below it launches cost more than exact float32's slow products
FINISH_ROWS, FINISH_COLUMNS = 16, 32  # of finish_kernel's tiles


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    rows; adapters: how many; hidden: the largest h before an up-projection; width: N; linear: whether an adapter has no
    up-projection; out_norm: whether one has LN_out; itemsize: bytes of the taps' elements; exact: float32 without TF32;
    aligned: every K, h, N and stride of rows is a multiple of 16; arch: compute capability; processors: multiprocessors.
    """

    rows: int
    adapters: int
    hidden: int
    width: int
    linear: bool
    out_norm: bool
    itemsize: int
    exact: bool
    aligned: bool
    arch: int
    processors: int = 132


@dataclass(frozen=True)
class Tiles:
    """Rows of a program or of its steps; columns of N, or K, that a program or step has; a step over K; Triton's options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def algorithm(problem: Problem) -> str:
    """How a call runs.

    "fused":   forward in one kernel, hidden and sum on chip.
    "staged":  forward in two, the results of the adapters in memory between them, where LN_out needs their whole rows.
    "library": the reference's products by cuBLAS, where there are too many adapters or the hidden is too wide, and in exact
               float32, whose plain cores take longer than the passes over memory that fusing saves.
    """
    kind = "exact" if problem.exact else "tf32" if problem.itemsize == 4 else "16 bits"
    too_wide = padded(problem.hidden) > WIDEST_HIDDEN[kind] or problem.adapters > MOST_ADAPTERS
    if too_wide or (problem.exact and problem.rows >= FEW_ROWS):
        return "library"
    return "staged" if problem.out_norm else "fused"


def narrow(problem: Problem) -> bool:
    """Whether registers, or rows that are loaded an element at a time, leave room for small tiles only."""
    return problem.itemsize == 4 or not problem.aligned


def fused_tiles(problem: Problem) -> Tiles:
    """Tiles of fused_kernel: all of N up to 256, since each tile of columns computes the hidden again."""
    if narrow(problem):
        return Tiles(16, min(padded(problem.width), 64), 32, 4, 2)
    columns = min(padded(problem.width), 128 if problem.linear or problem.hidden > 128 else 256)
    column_tiles = -(-problem.width // columns)
    if problem.rows * column_tiles <= 32 * problem.processors:
        return Tiles(16, columns, 64, 4, 2)
    return Tiles(64 if problem.hidden <= 128 else 32, columns, 64, 8, 3)


def member_tiles(problem: Problem) -> Tiles:
    """Tiles of member_kernel and of hidden_grad_kernel, which start a program for every adapter."""
    if narrow(problem):
        return Tiles(16, 32, 32, 4, 2)
    if problem.rows * problem.adapters <= 32 * problem.processors:
        return Tiles(16, 64, 64, 4, 2)
    return Tiles(64 if problem.hidden <= 128 else 32, 64, 64, 8, 2 if problem.arch in SMALL_SHARED_MEMORY else 3)


def combine_tiles(problem: Problem) -> Tiles:
    """Tiles of combine_kernel, which only adds."""
    return Tiles(16, 128 if problem.width > 64 else padded(problem.width), 16, 4, 2)


def hidden_tile(problem: Problem, widest: int) -> int:
    """How much of `widest`, the largest h, weight_grad_kernel has in a tile."""
    return min(padded(widest), 64 if narrow(problem) else 128)


def weight_tiles(problem: Problem) -> Tiles:
    """Tiles of weight_grad_kernel: (rows a step, columns of a tap or of dy)."""
    return Tiles(32, 32, 16, 8, 2) if narrow(problem) else Tiles(64, 64, 16, 8, 2)


def row_splits(problem: Problem, tiles: int, rows: int) -> int:
    """Into how many runs of rows the sums over rows are cut, for this many tiles and rows a step.

    Enough to give every multiprocessor two programs, at most 32 so that finish_kernel has little to add.
    """
    wanted = -(-2 * problem.processors // max(tiles, 1))
    return max(1, min(wanted, 32, -(-problem.rows // rows)))
