"""Which tiles serve a shape, and into how many runs the sums of the weight's gradient are cut: functions of numbers.

What is compared is a model of an H200, not a measurement; README.md has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastadapt.core.launch import processors

KERNEL_SIZES = (3, 5, 7)
COLUMNS = 8  # of a tile: most grids are 7, 14, 16, 24 or 37 wide
CHANNEL_BYTES = (256, 128, 64)  # of a token in a tile
WARP_BYTES = 32 * 16  # every thread has 16 bytes of a row
# the most rows of a tile that stay in registers (tests/codegen proves it): in conv_kernel, by the kernel's height, sums beside
# the taps of one of its columns; in weight_grad_kernel, dY's beside the sums of KERNEL_COLUMNS of the kernel's columns
CONV_ROWS = {3: 8, 5: 6, 7: 4}
WEIGHT_GRAD_ROWS = 8
KERNEL_COLUMNS = {3: 3, 5: 2, 7: 1}
PROGRAMS_EACH = 2  # programs of the weight's gradient for every multiprocessor, as many as it holds at once


@dataclass(frozen=True)
class Problem:
    """What the choice depends on: x (batch, prefix tokens + height * width, channels) and a kernel kh x kw.

    itemsize: bytes of x's elements; processors: the GPU's multiprocessors.
    """

    batch: int
    height: int
    width: int
    channels: int
    kh: int
    kw: int
    dilation: int
    itemsize: int
    processors: int = 132


def problem(
    batch: int,
    height: int,
    width: int,
    channels: int,
    kernel: tuple[int, int],
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """The Problem of a call in `dtype` on this device."""
    return Problem(batch, height, width, channels, *kernel, dilation, dtype.itemsize, processors(device))


@dataclass(frozen=True)
class Tiles:
    """How the grid and the channels of a sample are cut.

    rows, columns, channels: of a tile; residues: how many rows differ modulo the dilation, as those of a tile do not;
    count, column_tiles, channel_tiles: tiles of a grid, those that lie side by side in it, and those of the channels.
    """

    rows: int
    columns: int
    channels: int
    residues: int
    count: int
    column_tiles: int
    channel_tiles: int
    num_warps: int


def conv_tiles(problem: Problem) -> Tiles:
    """Tiles of conv_kernel."""
    return _tiles(problem, CONV_ROWS[problem.kh])


def weight_grad_tiles(problem: Problem) -> Tiles:
    """Tiles of weight_grad_kernel."""
    return _tiles(problem, WEIGHT_GRAD_ROWS)


def _tiles(problem: Problem, most_rows: int) -> Tiles:
    residues = min(problem.dilation, problem.height)
    congruent = -(-problem.height // residues)
    bands = -(-congruent // most_rows)
    column_tiles = -(-problem.width // COLUMNS)
    widths = [size // problem.itemsize for size in CHANNEL_BYTES]
    channels = min(widths, key=lambda width: (-(-problem.channels // width) * width, -width))
    return Tiles(
        rows=-(-congruent // bands),
        columns=COLUMNS,
        channels=channels,
        residues=residues,
        count=bands * residues * column_tiles,
        column_tiles=column_tiles,
        channel_tiles=-(-problem.channels // channels),
        num_warps=COLUMNS * channels * problem.itemsize // WARP_BYTES,
    )


def kernel_groups(problem: Problem) -> int:
    """Into how many groups of KERNEL_COLUMNS the columns of the kernel are cut."""
    return -(-problem.kw // KERNEL_COLUMNS[problem.kh])


def tile_splits(problem: Problem, tiles: Tiles) -> int:
    """Into how many runs the tiles of all samples are cut: enough programs for every multiprocessor, each with some tile."""
    count = problem.batch * tiles.count
    wanted = -(-PROGRAMS_EACH * problem.processors // (tiles.channel_tiles * kernel_groups(problem)))
    each = -(-count // max(1, min(wanted, count)))
    return -(-count // max(1, each))
