"""Which calls the kernels take, how the bottleneck is cut into pieces, and into how many runs rows are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastadapt.kernels.loca import config
from fastadapt.kernels.loca.config import Problem

MAPPER = Problem(32 * 1370, 768, 288, 24, 96, 768, itemsize=2, exact=False, arch=90)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "fused"),
        ({"itemsize": 4}, "fused"),
        ({"itemsize": 4, "exact": True}, "library"),
        ({"hidden": 320, "reduced": 32, "local": 128}, "fused"),
        ({"hidden": 321}, "library"),
        ({"reduced": 33}, "library"),
        ({"local": 129}, "library"),
    ],
)
def test_what_the_kernels_take(change, expected):
    assert config.algorithm(replace(MAPPER, **change)) == expected


def test_float32_is_exact_unless_torch_allows_tf32():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, exact in (("highest", True), ("high", False)):
            torch.set_float32_matmul_precision(setting)
            assert config.problem(9, 8, 7, 3, 4, 8, torch.float32, torch.device("cpu")).exact is exact
    finally:
        torch.set_float32_matmul_precision(before)


def test_pieces_hold_every_column_with_little_to_spare():
    assert config.pieces(288) == (256, 32)
    for hidden in range(1, config.WIDEST_HIDDEN + 1):
        first, rest = config.pieces(hidden)
        assert first + rest >= hidden and all(size >= 16 and size & (size - 1) == 0 for size in (first, rest))
        assert first + rest <= max(32, hidden + hidden // 2)


@pytest.mark.parametrize(("rows", "tiles", "expected"), [(32 * 1370, 78, 4), (32 * 1370, 1000, 1), (10, 4, 1), (10**7, 1, 32)])
def test_splits_fill_the_gpu_and_are_not_too_many(rows, tiles, expected):
    assert config.row_splits(replace(MAPPER, rows=rows), tiles, 64) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, False),
        ({"itemsize": 4}, True),
        ({"depth": 100}, True),
        ({"hidden": 280}, True),
        ({"local": 100}, True),
        ({"out": 776}, True),
        ({"reduced": 17}, False),
        ({"hidden": 320}, False),
        ({"hidden": 320, "arch": 80}, True),
    ],
)
def test_small_tiles_where_registers_are_taken(change, expected):
    problem = replace(MAPPER, **change)
    assert problem.crowded is expected
    assert (config.hidden_tiles(problem).rows == 16) is expected
