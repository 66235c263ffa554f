"""Which calls the kernels take, and with which tiles: functions of numbers, tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastadapt.core.launch import arch_of, processors
from fastadapt.core.tiles import HOPPER_AND_LATER, exact

WIDTHS = {2: (16, 32, 64, 128), 4: (16, 32, 64)}  # by itemsize: four-byte weights of 128 x 128 leave no registers
MOST_WORDS = 32
MOST_SPLITS = 64
PROGRAMS_EACH = 2  # programs of the weights' gradients that a multiprocessor holds at once


def why_not_triton(width: int, words: int, dtype: torch.dtype) -> list[str]:
    """Every reason why the kernels do not take x of this width and dtype with this many words in y; empty if they do."""
    widths = WIDTHS[dtype.itemsize] if dtype.itemsize in WIDTHS else ()
    reasons = []
    if width not in widths:
        reasons.append(f"x is {width} wide, kernels for {dtype} exist for {', '.join(map(str, widths)) or 'none'}")
    if words > MOST_WORDS:
        reasons.append(f"y has {words} rows, kernels take up to {MOST_WORDS}")
    return reasons


@dataclass(frozen=True)
class Problem:
    """What the choice of tiles depends on.

    width: d; itemsize: bytes of x's elements; exact: float32 without TF32; arch: compute capability; processors: the GPU's
    multiprocessors.
    """

    width: int
    itemsize: int
    exact: bool
    arch: int
    processors: int = 132


def problem(width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The Problem of a call in `dtype` on this device, under torch's present float32_matmul_precision."""
    return Problem(width, dtype.itemsize, exact(dtype), arch_of(device), processors(device))


def precision(problem: Problem) -> str:
    """Triton's input_precision for float32; 16-bit operands ignore it.

    Exact float32 is three TF32 products, whose error is that of a float32 sum: on the plain cores the operands of a product
    that is `width` deep do not fit in registers.
    """
    return "tf32x3" if problem.exact else "tf32"


@dataclass(frozen=True)
class Tiles:
    """Rows of a tile and warps of a program."""

    rows: int
    num_warps: int


# Those that keep every value in registers (tests/codegen proves it).  Where wgmma does not apply, operands take registers too.
LARGE, MEDIUM, WIDE, SMALL = Tiles(64, 4), Tiles(32, 4), Tiles(32, 8), Tiles(16, 8)


def forward_tiles(problem: Problem) -> Tiles:
    """Tiles of forward_kernel, rows of x."""
    if problem.itemsize == 4:
        return SMALL
    if problem.width == 128:
        return WIDE
    return LARGE if problem.arch in HOPPER_AND_LATER else MEDIUM


def backward_tiles(problem: Problem) -> Tiles:
    """Tiles of over_image_backward_kernel and over_words_backward_kernel, rows of x."""
    return SMALL if problem.width == 128 else forward_tiles(problem)


def word_warps(problem: Problem) -> int:
    """Warps of words_kernel and words_backward_kernel, whose tile is all words of a sample."""
    return 4 if problem.width * problem.itemsize <= 128 else 8


def weight_tiles(problem: Problem) -> Tiles:
    """Tiles of weight_grads_kernel, whose sums are (width, width) whatever the rows."""
    return LARGE if problem.itemsize == 2 else WIDE


def weight_stages(problem: Problem) -> int:
    """Steps of weight_grads_kernel that are loaded at once; a second one spills where the sums are in tensor memory."""
    return 1 if problem.arch in (100, 103) else 2


def splits(problem: Problem, rows: int, jobs: int) -> int:
    """Into how many runs the sums over `rows` rows are cut: enough to fill the GPU, few enough that partial sums stay small."""
    wanted = -(-PROGRAMS_EACH * problem.processors // jobs)
    return max(1, min(wanted, MOST_SPLITS, -(-rows // weight_tiles(problem).rows)))
