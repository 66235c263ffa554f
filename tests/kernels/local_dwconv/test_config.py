"""The choice of tiles and of runs of tiles: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from fastadapt.kernels.local_dwconv import config
from fastadapt.kernels.local_dwconv.config import Problem, Tiles

COMMON = Problem(32, 37, 37, 768, 3, 3, dilation=1, itemsize=2)


def test_the_problem_of_a_call():
    found = config.problem(32, 37, 37, 768, (3, 5), 2, torch.float32, torch.device("meta"))
    assert found == replace(COMMON, kw=5, dilation=2, itemsize=4)


@pytest.mark.parametrize(
    ("change", "tiles"),
    [
        ({}, Tiles(8, 8, 128, 1, 25, 5, 6, 4)),
        ({"height": 14, "width": 14}, Tiles(7, 8, 128, 1, 4, 2, 6, 4)),  # two bands of 7 rows, not one of 8 and one of 6
        ({"height": 5, "width": 9}, Tiles(5, 8, 128, 1, 2, 2, 6, 4)),
        ({"height": 1, "width": 1}, Tiles(1, 8, 128, 1, 1, 1, 6, 4)),
        ({"dilation": 2}, Tiles(7, 8, 128, 2, 30, 5, 6, 4)),  # 19 even rows and 18 odd ones, in three bands each
        ({"dilation": 50}, Tiles(1, 8, 128, 37, 185, 5, 6, 4)),  # no two rows are congruent
        ({"channels": 64}, Tiles(8, 8, 64, 1, 25, 5, 1, 2)),
        ({"channels": 96}, Tiles(8, 8, 32, 1, 25, 5, 3, 1)),
        ({"channels": 1}, Tiles(8, 8, 32, 1, 25, 5, 1, 1)),
        ({"itemsize": 4}, Tiles(8, 8, 64, 1, 25, 5, 12, 4)),
        ({"kh": 5}, Tiles(6, 8, 128, 1, 35, 5, 6, 4)),
        ({"kh": 7}, Tiles(4, 8, 128, 1, 50, 5, 6, 4)),
        ({"kw": 7}, Tiles(8, 8, 128, 1, 25, 5, 6, 4)),
    ],
)
def test_conv_tiles(change, tiles):
    assert config.conv_tiles(replace(COMMON, **change)) == tiles


def test_tiles_of_the_weights_gradient_are_as_high_whatever_the_kernel():
    assert {config.weight_grad_tiles(replace(COMMON, kh=kh)).rows for kh in (3, 5, 7)} == {8}


def test_every_position_is_in_one_tile():
    """As the kernels number them, for any grid and dilation."""
    for height, width, dilation in product((1, 2, 7, 9, 37), (1, 8, 9), (1, 2, 3, 40)):
        tiles = config.conv_tiles(replace(COMMON, height=height, width=width, dilation=dilation))
        positions = []
        for tile in range(tiles.count):
            band, column = divmod(tile, tiles.column_tiles)
            first = band // tiles.residues * tiles.rows * dilation + band % tiles.residues
            rows = (first + r * dilation for r in range(tiles.rows))
            columns = range(column * tiles.columns, (column + 1) * tiles.columns)
            positions += [(i, j) for i, j in product(rows, columns) if i < height and j < width]
        assert sorted(positions) == [*product(range(height), range(width))]


@pytest.mark.parametrize(("kernel", "groups"), [((3, 3), 1), ((3, 7), 3), ((5, 3), 2), ((5, 5), 3), ((7, 7), 7)])
def test_kernel_groups(kernel, groups):
    assert config.kernel_groups(replace(COMMON, kh=kernel[0], kw=kernel[1])) == groups


@pytest.mark.parametrize(
    ("change", "splits"),
    [
        ({}, 43),  # 6 tiles of channels and 800 of patches: 43 runs of 19, for 258 programs
        ({"channels": 64}, 200),  # runs of 4
        ({"kh": 7, "kw": 7}, 7),
        ({"processors": 8}, 3),
        ({"batch": 1, "height": 7, "width": 7}, 1),  # one tile
        ({"batch": 0}, 0),
    ],
)
def test_tile_splits(change, splits):
    problem = replace(COMMON, **change)
    assert config.tile_splits(problem, config.weight_grad_tiles(problem)) == splits
