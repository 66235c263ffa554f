"""Which algorithm and which tiles serve a shape: functions of numbers, tested without a GPU.

The costs compared here are a model of an H200 (4.3 TB/s, 790 TFLOP/s in 16 bits), not measurements; README.md has the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import log2
from pathlib import Path

import torch

from fastadapt.core.launch import arch_of, gpu_name, processors
from fastadapt.core.tiles import HOPPER_AND_LATER, SMALL_SHARED_MEMORY, exact, padded

BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12
LAUNCH_SECONDS = 3e-6
FUSED_RANKS = {2: 64, 4: 16}  # by itemsize, the widest low-rank accumulator that fits beside the base product's
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.  depth and width are those of the product: K and N forward, N and K for the input gradient.

    itemsize: bytes of x's elements; weight_itemsize: of the weight's; exact: float32 without TF32; arch: compute capability;
    processors: the GPU's multiprocessors; gpu: its name, "" where only the architecture is known; backward: whether the product is
    the input gradient, where dropout's mask falls on the result instead of on the input; members: how many linears share x.
    """

    rows: int
    depth: int
    width: int
    rank: int
    dropout: bool
    itemsize: int
    weight_itemsize: int
    exact: bool
    arch: int
    processors: int = 132
    gpu: str = ""
    backward: bool = False
    members: int = 1


def problem(
    rows: int,
    depth: int,
    width: int,
    rank: int,
    dropout: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
    backward: bool = False,
    members: int = 1,
) -> Problem:
    """The Problem of a call computed in `dtype` on this device, under torch's present float32_matmul_precision."""
    return Problem(
        rows=rows,
        depth=depth,
        width=width,
        rank=rank,
        dropout=dropout,
        itemsize=dtype.itemsize,
        weight_itemsize=weight_dtype.itemsize,
        exact=exact(dtype),
        arch=arch_of(device),
        processors=processors(device),
        gpu=gpu_name(device),
        backward=backward,
        members=members,
    )


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel launch and Triton's launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def rank_tile(problem: Problem, fused: bool) -> int:
    """Ranks of one step of the update: all of them where the product stays in registers, else as many as `step_ranks`."""
    return padded(problem.rank) if fused else step_ranks(problem)


def step_ranks(problem: Problem) -> int:
    """Ranks that a product is computed or read in steps of; the plain cores of exact float32 have no registers for more."""
    return 16 if problem.exact else min(padded(problem.rank), 64)


def algorithm(problem: Problem) -> str:
    """How the base and the low-rank product are combined.

    "library": cuBLAS for every product.  Exact float32 runs on the plain cores, where one more pass over memory is nothing.
    "merge":   W + scale B A formed while a float32 weight is cast to 16 bits, which must happen anyway; then cuBLAS.
    "fused":   the low-rank product accumulated beside the base product: one kernel.
    "split":   the low-rank product first, in a kernel of its own that reads the input once more.
    """
    if problem.exact:
        return "split" if problem.dropout else "library"
    if problem.weight_itemsize > problem.itemsize and not problem.dropout:
        return "merge"
    return "fused" if fits_fused(problem) and fused_seconds(problem) <= split_seconds(problem) else "split"


def fits_fused(problem: Problem) -> bool:
    """Whether one kernel keeps both products in registers (tests/codegen proves it).

    Before Hopper the operands' fragments are there too, which leaves no room for a wide low-rank product, nor for
    dropout's random numbers in the loop or beside several members.
    """
    if problem.arch in HOPPER_AND_LATER:
        return padded(problem.rank) <= FUSED_RANKS[problem.itemsize]
    return padded(problem.rank) <= 16 and not (problem.dropout and (not problem.backward or problem.members > 1))


def fused_seconds(problem: Problem) -> float:
    """Modelled cost of the low-rank product beside the base product: every column tile repeats it, and dropout's mask."""
    repeats = -(-problem.width // gemm_tiles(problem).columns)
    flops = 2 * problem.rows * problem.depth * padded(problem.rank) * repeats
    # the mask costs about eight integer instructions an element, as long as 240 tensor-core operations
    mask = 240 * problem.rows * problem.depth * repeats if problem.dropout and not problem.backward else 0
    return (flops + mask) / FLOPS_PER_SECOND


def split_seconds(problem: Problem) -> float:
    """Modelled cost of the low-rank product on its own: one more read of the input and one more launch."""
    return problem.rows * (problem.depth + 2 * problem.rank) * problem.itemsize / BYTES_PER_SECOND + LAUNCH_SECONDS


# Tiles, for 16-bit operands unless named otherwise, with the share of the matrix rate that they are assumed to reach, best first.
WIDE = (Tiles(128, 256, 64, 8, 3), 1.0)
COMMON = (
    (Tiles(128, 128, 64, 8, 3), 0.9),
    (Tiles(64, 128, 64, 4, 3), 0.8),
    (Tiles(64, 64, 64, 4, 3), 0.6),
)
SMALL = ((Tiles(128, 128, 32, 8, 3), 0.9), *COMMON[1:])  # three stages of (128, 128, 64) exceed 99 KiB
NARROW = ((Tiles(128, 64, 64, 8, 3), 0.7), COMMON[-1])  # a masked update or several members leave no registers for more
SMALLEST = ((Tiles(64, 32, 32, 4, 2), 0.4),)
FOUR_BYTES = ((Tiles(64, 64, 32, 4, 2), 1.0),)
EXACT_TIGHT = ((Tiles(32, 32, 32, 4, 2), 0.4),)


def candidates(problem: Problem) -> tuple[tuple[Tiles, float], ...]:
    """The tiles that keep every value in registers and shared memory (tests/codegen proves it)."""
    masks_result = problem.dropout and problem.backward
    crowded = problem.backward and problem.members > 1
    odd = problem.depth % 16 or problem.width % 16  # then Triton loads rows an element at a time
    tight = crowded or odd or problem.rank % 16
    if problem.exact:
        return EXACT_TIGHT if tight else FOUR_BYTES
    if problem.itemsize == 4:
        return SMALLEST if tight and problem.arch not in HOPPER_AND_LATER else FOUR_BYTES
    if odd:
        return SMALLEST
    if (masks_result and crowded) or (problem.arch not in HOPPER_AND_LATER and (masks_result or crowded)):
        return NARROW
    if problem.arch in SMALL_SHARED_MEMORY:
        return SMALL
    if problem.arch not in HOPPER_AND_LATER or masks_result or problem.rank > 16:
        return COMMON
    return (WIDE, *COMMON)


def gemm_tiles(problem: Problem) -> Tiles:
    """Tiles of forward_kernel and grad_input_kernel: from the GPU's tuned table, else those with the fewest modelled waves."""
    tuned = nearest(problem, table(problem.gpu))
    if tuned is not None:
        return tuned

    def seconds(candidate: tuple[Tiles, float]) -> float:
        tiles, efficiency = candidate
        count = -(-problem.rows // tiles.rows) * -(-problem.width // tiles.columns)
        members = 1 if problem.backward else problem.members
        return -(-count * members // problem.processors) * tiles.rows * tiles.columns / efficiency

    return min(candidates(problem), key=seconds)[0]


def project_tiles(problem: Problem) -> Tiles:
    """Tiles of project_kernel; columns is the chunk of ranks one program computes."""
    ranks = step_ranks(problem)
    if problem.itemsize == 4:
        return Tiles(32, ranks, 32, 4, 2)
    if problem.rows >= 8192:
        return Tiles(64, ranks, 64, 4, 3)
    return Tiles(32, ranks, 64 if ranks < 64 else 32, 4, 3)


def factor_grad_tiles(problem: Problem) -> Tiles:
    """Tiles of factor_grads_kernel: (rows a step, columns of the wide operand, ranks)."""
    ranks = step_ranks(problem)
    if problem.itemsize == 4:
        return Tiles(32, 64, ranks, 4, 3)
    return Tiles(64 if ranks < 64 else 32, 128, ranks, 4, 3)


@lru_cache(maxsize=None)
def table(gpu: str) -> tuple[tuple[Problem, Tiles], ...]:
    """The tuned (problem, tiles) pairs of tables/GPU.json; none for a GPU that was not tuned."""
    path = TABLES / f"{gpu.replace(' ', '_')}.json"
    if not gpu or not path.exists():
        return ()
    return tuple((Problem(**entry["problem"]), Tiles(**entry["tiles"])) for entry in json.loads(path.read_text()))


def write_table(gpu: str, entries: Iterable[tuple[Problem, Tiles]]) -> Path:
    """Write the table that `table` reads."""
    path = TABLES / f"{gpu.replace(' ', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    rows = [{"problem": asdict(problem), "tiles": asdict(tiles)} for problem, tiles in entries]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    table.cache_clear()
    return path


def nearest(problem: Problem, entries: Iterable[tuple[Problem, Tiles]]) -> Tiles | None:
    """The tiles of the entry nearest in shape, in octaves, among those of the same direction, dropout, dtype, precision and members."""

    def kind(p: Problem) -> tuple:
        return p.backward, p.dropout, p.itemsize, p.exact, p.members

    def distance(p: Problem) -> float:
        sizes = ((p.rows, problem.rows), (p.depth, problem.depth), (p.width, problem.width), (p.rank, problem.rank))
        return sum(abs(log2(max(a, 1) / max(b, 1))) for a, b in sizes)

    alike = [entry for entry in entries if kind(entry[0]) == kind(problem)]
    return min(alike, key=lambda entry: distance(entry[0]))[1] if alike else None


def row_splits(problem: Problem, programs: int, tiles: Tiles) -> int:
    """Into how many runs of rows the sums of dA and dB are cut, `programs` being the programs of one run.

    Enough to give every multiprocessor two programs, at most 64 so that the partial sums stay small.
    """
    wanted = -(-2 * problem.processors // max(programs, 1))
    return max(1, min(wanted, 64, -(-problem.rows // tiles.rows)))
