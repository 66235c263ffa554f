"""What Triton serves, which tiles serve it, and into how many runs of queries the backward is cut: functions of numbers.

The costs compared here are a model of an H200 (4.3 TB/s), not measurements; README.md has the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastadapt.core.launch import arch_of, processors
from fastadapt.core.tiles import HOPPER_AND_LATER, exact, padded

HEAD_WIDTHS = (8, 16, 32, 64)
MOST_KEYS = 256
MOST_SPLITS = 16
BYTES_PER_SECOND = 4.3e12
LAUNCH_SECONDS = 3e-6
STEP_SECONDS = 1e-6  # of one step of the backward, however few bytes it moves: latencies of loads, products and reductions
PROGRAMS_EACH = 2  # programs of the backward that a multiprocessor holds at once


def why_not_triton(head_width: int, keys: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason why the kernels cannot serve heads of this width over that many keys; empty if they can."""
    if head_width not in HEAD_WIDTHS:
        return [f"heads are {head_width} wide, kernels exist for {', '.join(map(str, HEAD_WIDTHS))}"]
    most = most_keys(head_width, dtype.itemsize, arch_of(device))
    return [f"there are {keys} keys, one pass over heads {head_width} wide holds {most}"] if keys > most else []


def most_keys(head_width: int, itemsize: int, arch: int) -> int:
    """Keys of one head that stay on chip together with all that is computed from them (tests/codegen proves it)."""
    most_bytes = 32768 if arch in HOPPER_AND_LATER else 16384
    return min(MOST_KEYS, most_bytes // itemsize // padded(head_width))


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    itemsize: bytes of q's elements; exact: float32 without TF32; arch: compute capability; processors: multiprocessors.
    """

    batch: int
    queries: int
    keys: int
    num_heads: int
    head_width: int
    itemsize: int
    exact: bool
    arch: int
    processors: int = 132


def problem(
    batch: int, queries: int, keys: int, num_heads: int, head_width: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """The Problem of a call in `dtype` on this device, under torch's present float32_matmul_precision."""
    return Problem(
        batch=batch,
        queries=queries,
        keys=keys,
        num_heads=num_heads,
        head_width=head_width,
        itemsize=dtype.itemsize,
        exact=exact(dtype),
        arch=arch_of(device),
        processors=processors(device),
    )


@dataclass(frozen=True)
class Tiles:
    """Queries, keys and columns of a head that one step of a program works on, and Triton's launch options."""

    rows: int
    keys: int
    columns: int
    num_warps: int
    num_stages: int


# by whether the GPU is Hopper or later, where accumulators leave room for more, and by itemsize (tests/codegen proves them)
FORWARD_ROWS = {(True, 2): 128, (True, 4): 32, (False, 2): 128, (False, 4): 32}
BACKWARD_ROWS = {(True, 2): 64, (True, 4): 32, (False, 2): 32, (False, 4): 16}
BACKWARD_SCORES = {(True, 2): 8192, (True, 4): 1024, (False, 2): 4096, (False, 4): 512}


def forward_tiles(problem: Problem) -> Tiles:
    """Tiles of forward_kernel, which has no loop to put in stages."""
    kind = problem.arch in HOPPER_AND_LATER, problem.itemsize
    return _tiles(problem, FORWARD_ROWS[kind], num_stages=1)


def backward_tiles(problem: Problem) -> Tiles:
    """Tiles of backward_kernel: fewer rows the more keys there are, so that the scores of a step stay in registers."""
    kind = problem.arch in HOPPER_AND_LATER, problem.itemsize
    rows = max(16, min(BACKWARD_ROWS[kind], BACKWARD_SCORES[kind] // padded(problem.keys)))
    return _tiles(problem, rows, num_stages=2 if problem.itemsize == 2 else 1)


def _tiles(problem: Problem, rows: int, num_stages: int) -> Tiles:
    keys, columns = padded(problem.keys), padded(problem.head_width)
    if keys * columns <= 512:
        num_warps = 2  # more threads than 16-byte loads would load less each
    else:
        num_warps = 4 if keys <= 64 else 8
    return Tiles(min(rows, padded(problem.queries)), keys, columns, num_warps, num_stages)


@lru_cache(maxsize=1024)
def splits(problem: Problem, summed: bool) -> int:
    """Into how many runs of queries the backward cuts a head: as many as take the least modelled time.

    summed: whether dk or dv is wanted, whose partial sums are then written, read and added by one more launch.
    """
    tiles = backward_tiles(problem)
    steps = -(-problem.queries // tiles.rows)
    at_once = PROGRAMS_EACH * problem.processors
    step_bytes = 3 * tiles.rows * problem.head_width * problem.itemsize  # of q, dO and dq
    step_seconds = max(at_once * step_bytes / BYTES_PER_SECOND, STEP_SECONDS)
    partial_bytes = 2 * 2 * 4 * problem.batch * problem.keys * problem.num_heads * problem.head_width

    def seconds(count: int) -> float:
        waves = -(-problem.batch * problem.num_heads * count // at_once)
        runs = waves * -(-steps // count) * step_seconds
        if not summed or count == 1:
            return runs
        return runs + count * partial_bytes / BYTES_PER_SECOND + LAUNCH_SECONDS

    return min(range(1, max(1, min(steps, MOST_SPLITS)) + 1), key=seconds)
