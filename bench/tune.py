"""Tile sizes for this GPU: every candidate is proved, timed on the shapes of `bench ops`, and the fastest kept.

The table goes where the kernels read it (fastadapt/kernels/lora_linear/tables) and, with a row for every timing, into
a folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from bench.case import FASTADAPT, Arm, Case
from bench.cases import lora_linear
from bench.cases.common import DINO, VIT
from bench.cases.lora_linear import Shape
from bench.clocks import gpu_warm
from bench.job import recorder
from bench.run import Session
from bench.terminal import Bar
from fastadapt.core.launch import gpu_name
from fastadapt.kernels.lora_linear import config
from fastadapt.kernels.lora_linear.config import Problem, Tiles

SECONDS = 1.0  # of timing for all candidates of a shape
CANDIDATES = tuple(
    Tiles(rows, columns, depth, warps, stages)
    for rows, columns, depth, warps, stages in (
        (64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 32, 4, 4), (128, 128, 32, 8, 4),
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 256, 64, 4, 3), (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
    )
)  # fmt: skip
SHAPES = (
    *(Shape(rows, k, n) for rows in (VIT, DINO) for k, n in ((768, 768), (768, 3072), (3072, 768))),
    Shape(DINO, 1024, 4096),
    *(Shape(DINO, 768, n, dropout=0.0) for n in (768, 3072)),
)


def write(out: Path, console: Console) -> Path:
    """Tune for the current GPU; return the table's path in `out`.

    Raises RuntimeError without a GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning times kernels on a CUDA device, and torch.cuda.is_available() is False here")
    device = torch.device("cuda", torch.cuda.current_device())
    record = recorder(out, device, {"job": "tune", "candidates": CANDIDATES, "shapes": SHAPES})
    entries: list[tuple[Problem, Tiles]] = []
    with Bar(console) as bar:
        session = Session(record, {"gpu warm": gpu_warm}, {}, bar)
        for shape, backward in product(SHAPES, (False, True)):
            with bar.stage(f"{shape.name}, {'input gradient' if backward else 'forward'}", 0.5 / len(SHAPES)):
                entries += _tune(lora_linear.case(shape), backward, device, session)
    table = config.write_table(gpu_name(device), entries)
    return Path(shutil.copy(table, out))


def label(tiles: Tiles) -> str:
    """A candidate as an arm's name."""
    return f"{tiles.rows}x{tiles.columns}x{tiles.depth}, {tiles.num_warps} warps, {tiles.num_stages} stages"


def _tune(case: Case, backward: bool, device: torch.device, session: Session) -> list[tuple[Problem, Tiles]]:
    """The fastest candidate for one direction of a case; nothing where the algorithm chosen for it has no tiles."""
    problems: set[Problem] = set()

    def arm(tiles: Tiles) -> Callable[[Any], Arm]:
        return lambda inputs: _with_tiles(case.arms[FASTADAPT](inputs), tiles, backward, problems)

    candidates = replace(
        case,
        arms={label(tiles): arm(tiles) for tiles in CANDIDATES},
        verify=lambda name, arm, inputs: case.verify(FASTADAPT, arm, inputs),
        work={"forward+backward" if backward else "forward": None},
    )
    arms = session.prepare(candidates, list(candidates.arms), case.make_inputs(device))
    medians = {row.arm: row.values["median_s"] for row in session.measure(candidates, arms, SECONDS)}
    return [(problem, fastest(medians)) for problem in problems] if medians else []


def fastest(medians: dict[str, float]) -> Tiles:
    """The candidate whose label has the smallest median."""
    return next(tiles for tiles in CANDIDATES if label(tiles) == min(medians, key=medians.__getitem__))


def _with_tiles(arm: Arm, tiles: Tiles, backward: bool, problems: set[Problem]) -> Arm:
    """The arm with every product of one direction run in `tiles`; the problems that ask for tiles are noted."""

    def using(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with _tiles(tiles, backward, problems):
                return function(*arguments)

        return call

    return replace(arm, forward=using(arm.forward), backward=using(arm.backward), outputs=using(arm.outputs))


@contextmanager
def _tiles(tiles: Tiles, backward: bool, problems: set[Problem]) -> Iterator[None]:
    usual = config.gemm_tiles

    def gemm_tiles(problem: Problem) -> Tiles:
        if problem.backward != backward:
            return usual(problem)
        problems.add(problem)
        return tiles

    with mock.patch.object(config, "gemm_tiles", gemm_tiles):
        yield
