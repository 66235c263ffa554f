"""The choice of algorithm and tiles: numbers in, names and tiles out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastadapt.core.launch import target
from fastadapt.kernels.lora_linear import config
from fastadapt.kernels.lora_linear.config import Problem, Tiles

TOKENS = 32 * 1370
COMMON = Problem(TOKENS, 768, 768, 16, dropout=False, itemsize=2, weight_itemsize=2, exact=False, arch=90)
PROBLEMS = [
    replace(COMMON, rows=rows, depth=depth, width=width, rank=rank, dropout=dropout, backward=backward, arch=arch)
    for rows in (0, 1, 640, TOKENS)
    for depth, width in ((768, 768), (768, 3072), (3072, 768), (77, 51))
    for rank in (1, 16, 17, 64, 256)
    for dropout in (False, True)
    for backward in (False, True)
    for arch in (80, 89, 90, 100, 120)
]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "fused"),
        ({"rank": 1}, "fused"),
        ({"rank": 65}, "split"),  # its accumulator would leave no registers
        ({"rank": 256}, "split"),
        ({"width": 4096, "rank": 64}, "split"),  # sixteen column tiles would each repeat a wide product
        ({"dropout": True}, "split"),  # each of three column tiles would work out the mask
        ({"dropout": True, "rows": 640}, "fused"),  # where a launch costs more than that
        ({"dropout": True, "backward": True}, "fused"),  # the mask falls on the result, once
        ({"weight_itemsize": 4}, "merge"),  # the weight is cast anyway
        ({"weight_itemsize": 4, "rank": 256}, "merge"),
        ({"weight_itemsize": 4, "dropout": True}, "split"),  # no one matrix does what a mask between the factors does
        ({"itemsize": 4, "weight_itemsize": 4}, "fused"),  # TF32
        ({"itemsize": 4, "weight_itemsize": 4, "rank": 17}, "split"),
        ({"arch": 80}, "fused"),
        ({"arch": 80, "rank": 17}, "split"),  # before Hopper the operands take registers as well
        ({"arch": 80, "rows": 640, "dropout": True}, "split"),
        ({"itemsize": 4, "weight_itemsize": 4, "exact": True}, "library"),
        ({"itemsize": 4, "weight_itemsize": 4, "exact": True, "dropout": True}, "split"),
    ],
)
def test_algorithm(change, expected):
    assert config.algorithm(replace(COMMON, **change)) == expected


def test_what_is_fused_has_a_narrow_rank_and_what_is_merged_no_mask():
    for problem in PROBLEMS:
        for weight_itemsize in (2, 4):
            chosen = config.algorithm(replace(problem, weight_itemsize=weight_itemsize))
            assert chosen in ("fused", "split", "merge")
            assert chosen != "fused" or problem.rank <= 64
            assert (chosen == "merge") == (weight_itemsize == 4 and not problem.dropout)


@pytest.mark.parametrize(("rank", "padded"), [(1, 16), (3, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)])
def test_ranks_are_padded_to_what_tensor_cores_take(rank, padded):
    assert config.padded(rank) == padded
    problem = replace(COMMON, rank=rank)
    assert config.rank_tile(problem, fused=True) == padded
    assert config.rank_tile(problem, fused=False) == min(padded, 64)


def test_tiles_are_what_kernels_can_take():
    for problem in PROBLEMS:
        for itemsize in (2, 4):
            sized = replace(problem, itemsize=itemsize, weight_itemsize=itemsize)
            for tiles in (config.gemm_tiles(sized), config.project_tiles(sized), config.factor_grad_tiles(sized)):
                for size in (tiles.rows, tiles.columns, tiles.depth):
                    assert size >= 16 and size & (size - 1) == 0  # which also lets masks start at a multiple of 8
                assert tiles.num_warps in (4, 8) and tiles.num_stages >= 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (128, 256, 64)),
        ({"arch": 100}, (128, 256, 64)),
        ({"arch": 80}, (128, 128, 64)),
        ({"arch": 89}, (128, 128, 32)),
        ({"arch": 120}, (128, 128, 32)),
        ({"rows": 64}, (64, 64, 64)),  # few tiles: small ones, so that more multiprocessors have one
        ({"depth": 77}, (64, 32, 32)),
        ({"backward": True, "members": 3, "dropout": True}, (128, 64, 64)),
        ({"itemsize": 4, "weight_itemsize": 4}, (64, 64, 32)),
    ],
)
def test_gemm_tiles(change, expected):
    tiles = config.gemm_tiles(replace(COMMON, **change))
    assert (tiles.rows, tiles.columns, tiles.depth) == expected


def test_row_splits():
    tiles = Tiles(64, 128, 16, 4, 3)
    assert config.row_splits(COMMON, 12, tiles) == 22  # 264 programs: two for each of 132 multiprocessors
    assert config.row_splits(COMMON, 1, tiles) == 64  # partial sums stay small
    assert config.row_splits(COMMON, 1000, tiles) == 1
    assert config.row_splits(replace(COMMON, rows=130), 12, tiles) == 3  # no run is empty
    assert config.row_splits(replace(COMMON, rows=0), 12, tiles) == 1


def test_the_problem_of_a_call():
    device = torch.device("meta")
    arguments = (70, 72, 88, 3, True, torch.bfloat16, torch.float32, device)
    assert config.problem(*arguments) == Problem(70, 72, 88, 3, True, 2, 4, exact=False, arch=90)
    with target(80):
        problem = config.problem(*arguments, backward=True, members=3)
    assert (problem.arch, problem.backward, problem.members) == (80, True, 3)


@pytest.mark.parametrize(("setting", "exact"), [("highest", True), ("high", False), ("medium", False)])
def test_float32_is_exact_unless_torch_allows_tf32(setting, exact):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        float32 = config.problem(70, 72, 88, 3, True, torch.float32, torch.float32, torch.device("meta"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert float32.exact is exact


class TestTunedTables:
    GPU = "NVIDIA H200"
    ENTRIES = [
        (COMMON, Tiles(128, 256, 64, 8, 4)),
        (replace(COMMON, width=3072), Tiles(256, 128, 64, 8, 4)),
        (replace(COMMON, backward=True), Tiles(128, 128, 64, 8, 2)),
        (replace(COMMON, dropout=True), Tiles(64, 128, 64, 4, 2)),
    ]

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(config, "TABLES", tmp_path / "tables")
        config.table.cache_clear()
        yield
        config.table.cache_clear()

    def test_round_trip(self):
        assert config.table(self.GPU) == ()
        path = config.write_table(self.GPU, self.ENTRIES)
        assert path.name == "NVIDIA_H200.json" and path.read_text().endswith("\n")
        assert config.table(self.GPU) == tuple(self.ENTRIES)
        assert config.table("") == config.table("another GPU") == ()

    def test_the_nearest_shape_of_the_same_kind_is_taken(self):
        def nearest(**change) -> Tiles | None:
            return config.nearest(replace(COMMON, **change), self.ENTRIES)

        assert nearest(rows=100) == nearest(width=1024) == self.ENTRIES[0][1]
        assert nearest(width=4096, depth=1024) == self.ENTRIES[1][1]
        assert nearest(backward=True, width=3072) == self.ENTRIES[2][1]
        assert nearest(dropout=True, rows=0) == self.ENTRIES[3][1]
        assert nearest(itemsize=4) is nearest(members=3) is config.nearest(COMMON, []) is None

    def test_a_tuned_gpu_uses_its_table_and_no_other_does(self):
        config.write_table(self.GPU, self.ENTRIES)
        tuned = replace(COMMON, width=3072, gpu=self.GPU)
        assert config.gemm_tiles(tuned) == self.ENTRIES[1][1]
        assert config.gemm_tiles(replace(tuned, gpu="")) != self.ENTRIES[1][1]
