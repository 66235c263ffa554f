"""The choice of algorithm and tiles: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from fastadapt.kernels.side_fusion import config
from fastadapt.kernels.side_fusion.config import Problem

VISION = Problem(25600, 12, 128, 256, linear=False, out_norm=False, itemsize=2, exact=False, aligned=True, arch=90)
PROBLEMS = [
    replace(VISION, rows=rows, hidden=hidden, width=width, itemsize=size, aligned=aligned, linear=linear, arch=arch)
    for rows, hidden, width, size, aligned, linear, arch in product(
        (1, 1280, 25600), (1, 128, 256), (17, 256, 768), (2, 4), (True, False), (True, False), (80, 90, 120)
    )
]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "fused"),
        ({"linear": True}, "fused"),
        ({"out_norm": True}, "staged"),
        ({"hidden": 256}, "fused"),
        ({"hidden": 257}, "library"),
        ({"itemsize": 4}, "fused"),
        ({"itemsize": 4, "hidden": 129}, "library"),
        ({"itemsize": 4, "exact": True}, "library"),
        ({"itemsize": 4, "exact": True, "rows": 640, "hidden": 64}, "fused"),
        ({"itemsize": 4, "exact": True, "rows": 640, "hidden": 65}, "library"),
        ({"adapters": 24}, "fused"),
        ({"adapters": 25}, "library"),
    ],
)
def test_algorithm(change, expected):
    assert config.algorithm(replace(VISION, **change)) == expected


def test_tiles_are_what_tensor_cores_take():
    for problem in PROBLEMS:
        for tiles in map(lambda choice: choice(problem), (config.fused_tiles, config.member_tiles, config.weight_tiles)):
            for size in (tiles.rows, tiles.columns, tiles.depth, config.hidden_tile(problem, 200)):
                assert size >= 16 and size & (size - 1) == 0


def test_the_hidden_of_a_tower_is_computed_once():
    """One tile has all of N = 256; twice as many columns are two tiles, each of which computes the hidden."""
    assert config.fused_tiles(VISION).columns == 256
    assert config.fused_tiles(replace(VISION, width=512)).columns == 256


def test_few_rows_get_more_programs():
    assert config.fused_tiles(VISION).rows == config.member_tiles(VISION).rows == 64
    assert config.fused_tiles(replace(VISION, rows=1280)).rows == 16
    assert config.member_tiles(replace(VISION, rows=1280)).rows == 64  # times twelve adapters
    assert config.member_tiles(replace(VISION, rows=1280, adapters=1)).rows == 16


@pytest.mark.parametrize(
    ("rows", "tiles", "expected"), [(0, 96, 1), (25600, 96, 3), (25600, 1, 32), (1280, 288, 1), (65, 1, 2)]
)
def test_runs_of_rows(rows, tiles, expected):
    assert config.row_splits(replace(VISION, rows=rows), tiles, 64) == expected
