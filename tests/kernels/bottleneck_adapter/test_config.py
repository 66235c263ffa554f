"""The choice of algorithm and tiles: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from fastadapt.kernels.bottleneck_adapter import config
from fastadapt.kernels.bottleneck_adapter.config import Problem

COMMON = Problem(43840, 768, 768, 64, itemsize=2, weight_itemsize=2, exact=False, arch=90)
PROBLEMS = [
    replace(COMMON, rows=rows, depth=depth, h=h, itemsize=size, arch=arch)
    for rows, depth, h, size, arch in product((1, 640, 6304, 43840), (768, 77), (1, 32, 64, 128, 256), (2, 4), (80, 90, 120))
]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "fused"),
        ({"h": 256}, "fused"),
        ({"h": 257}, "library"),
        ({"itemsize": 4, "h": 128}, "fused"),
        ({"itemsize": 4, "h": 129}, "library"),
        ({"itemsize": 4, "exact": True, "rows": 640, "h": 65}, "library"),
        ({"itemsize": 4, "exact": True}, "library"),
        ({"itemsize": 4, "exact": True, "rows": 640}, "fused"),
    ],
)
def test_algorithm(change, expected):
    assert config.algorithm(replace(COMMON, **change)) == expected


def test_tiles_are_what_tensor_cores_take():
    for problem in PROBLEMS:
        for tiles in (config.row_tiles(problem), config.weight_tiles(problem)):
            for size in (tiles.rows, tiles.columns):
                assert size >= 16 and size & (size - 1) == 0


def test_few_rows_get_more_programs():
    """A text of 640 tokens in tiles of 64 rows would leave nine of ten multiprocessors idle."""
    assert config.row_tiles(replace(COMMON, rows=640)).rows == 16
    assert config.row_tiles(COMMON).rows == 128


@pytest.mark.parametrize(("rows", "tiles", "expected"), [(0, 12, 1), (64, 12, 1), (65, 12, 2), (43840, 12, 22), (43840, 1, 32)])
def test_runs_of_rows(rows, tiles, expected):
    assert config.row_splits(replace(COMMON, rows=rows), tiles, 64) == expected
