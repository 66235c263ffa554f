"""The choice of the kernel and of its tiles: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastadapt.kernels.local_conv_adapter import config
from fastadapt.kernels.local_conv_adapter.config import Problem

COMMON = Problem(32 * 1370, 768, 64, 768, reach=38, itemsize=2, exact=False, arch=90)


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation", "reach"),
    [((37, 37), (3, 3), 1, 38), ((37, 37), (7, 5), 2, 6 * 37 + 4), ((5, 9), (3, 3), 2**40, 4 * 9 + 8), ((1, 1), (7, 7), 1, 0)],
)
def test_the_reach_of_a_convolution(grid, kernel, dilation, reach):
    found = config.problem(32 * 1370, 768, 64, 768, grid, kernel, dilation, torch.bfloat16, torch.device("meta"))
    assert found == replace(COMMON, reach=reach)


@pytest.mark.parametrize(
    ("change", "algorithm"),
    [
        ({}, "fused"),
        ({"h": 256}, "fused"),
        ({"h": 257}, "library"),
        ({"h": 128, "itemsize": 4}, "fused"),
        ({"h": 129, "itemsize": 4}, "library"),
        ({"h": 129, "depth": 700}, "library"),
        ({"itemsize": 4, "exact": True}, "library"),
        ({"reach": 4 * 64}, "fused"),
        ({"reach": 4 * 64 + 1}, "library"),
        ({"rows": 1370, "reach": 4 * 16 + 1}, "fused"),
    ],
    ids=str,
)
def test_what_the_kernel_takes_and_where_it_pays(change, algorithm):
    problem = replace(COMMON, **change)
    assert config.algorithm(problem) == algorithm
    assert config.pays(problem, gradients=False) == (algorithm == "fused")
    assert not config.pays(problem, gradients=True)


def test_a_few_rows_are_cut_into_tiles_for_every_multiprocessor():
    assert config.tiles(COMMON).rows == 64 and config.tile_reach(COMMON) == 1
    few = replace(COMMON, rows=1370)
    assert config.tiles(few).rows == 16 and config.tile_reach(few) == 3
    assert config.tiles(replace(few, reach=65)).rows == 64
