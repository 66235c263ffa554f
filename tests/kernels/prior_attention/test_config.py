"""The choice of tiles and of runs of queries: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastadapt.core.launch import target
from fastadapt.kernels.prior_attention import config
from fastadapt.kernels.prior_attention.config import Problem

COMMON = Problem(32, 1370, 77, 12, 64, itemsize=2, exact=False, arch=90)


def test_the_problem_of_a_call():
    arguments = (32, 1370, 77, 12, 64, torch.float32, torch.device("meta"))
    with target(80):
        assert config.problem(*arguments) == replace(COMMON, itemsize=4, exact=True, arch=80)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert config.problem(*arguments) == replace(COMMON, itemsize=4)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("arch", "itemsize", "head_width", "most"),
    [
        (90, 4, 64, 128),
        (90, 2, 64, 256),
        (100, 2, 64, 256),
        (80, 2, 64, 128),
        (80, 2, 8, 256),
        (80, 4, 64, 64),
        (120, 2, 32, 256),
    ],
)
def test_the_most_keys_that_stay_on_chip(arch, itemsize, head_width, most):
    assert config.most_keys(head_width, itemsize, arch) == most


@pytest.mark.parametrize(
    ("change", "forward", "backward"),
    [
        ({}, (128, 128, 64, 8, 1), (64, 128, 64, 8, 2)),
        ({"keys": 20}, (128, 32, 64, 4, 1), (64, 32, 64, 4, 2)),
        ({"keys": 256}, (128, 256, 64, 8, 1), (32, 256, 64, 8, 2)),
        ({"keys": 17, "head_width": 8}, (128, 32, 16, 2, 1), (64, 32, 16, 2, 2)),
        ({"itemsize": 4}, (32, 128, 64, 8, 1), (16, 128, 64, 8, 1)),
        ({"arch": 80}, (128, 128, 64, 8, 1), (32, 128, 64, 8, 2)),
        ({"arch": 80, "itemsize": 4, "keys": 20}, (32, 32, 64, 4, 1), (16, 32, 64, 4, 1)),
        ({"queries": 17}, (32, 128, 64, 8, 1), (32, 128, 64, 8, 2)),
        ({"queries": 0, "keys": 0}, (16, 16, 64, 4, 1), (16, 16, 64, 4, 2)),
    ],
)
def test_tiles(change, forward, backward):
    problem = replace(COMMON, **change)
    assert config.forward_tiles(problem) == config.Tiles(*forward)
    assert config.backward_tiles(problem) == config.Tiles(*backward)


def test_tiles_are_what_tensor_cores_take():
    for arch in (80, 89, 90, 100, 120):
        for itemsize in (2, 4):
            for keys in (0, 1, 16, 17, 77, 256):
                for queries in (0, 1, 100, 1370):
                    problem = replace(COMMON, arch=arch, itemsize=itemsize, keys=keys, queries=queries)
                    for tiles in (config.forward_tiles(problem), config.backward_tiles(problem)):
                        assert tiles.keys >= keys and tiles.columns == 64
                        assert all(size >= 16 and size & (size - 1) == 0 for size in (tiles.rows, tiles.keys))


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"batch": 264, "num_heads": 1}, 1),  # a program for every place there is
        ({"batch": 1}, 11),  # twelve heads are few programs
        ({"batch": 1, "queries": 64}, 1),  # one step cannot be cut
        ({"batch": 0}, 1),
        ({"queries": 0}, 1),
    ],
)
def test_splits(change, count):
    assert config.splits(replace(COMMON, **change), summed=True) == count


def test_runs_are_more_where_nothing_is_summed():
    assert config.splits(COMMON, summed=False) > config.splits(COMMON, summed=True)
