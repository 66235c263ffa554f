"""Tuning needs a GPU and says so; what it does with timings does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import tune
from bench.case import FASTADAPT
from bench.cases import lora_linear
from bench.cases.lora_linear import Shape
from bench.meta import as_on_cuda
from fastadapt.core.launch import recording


def test_without_a_gpu_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="times kernels on a CUDA device"):
        tune.write(tmp_path, Console(quiet=True))


def test_the_fastest_is_kept() -> None:
    medians = {tune.label(tiles): 1.0 + i for i, tiles in enumerate(tune.CANDIDATES[3:])}
    assert tune.fastest(medians) == tune.CANDIDATES[3]


def test_labels_tell_candidates_apart() -> None:
    assert len({tune.label(tiles) for tiles in tune.CANDIDATES}) == len(tune.CANDIDATES)


@pytest.mark.parametrize("backward", [False, True])
def test_a_candidate_reaches_the_kernels_of_its_direction_only(backward: bool) -> None:
    """The launches recorded on the meta device have the candidate's tiles in one direction, the usual ones else."""
    tiles = replace(tune.CANDIDATES[0], num_warps=2)
    case = lora_linear.case(Shape(4096, 768, 768, dropout=0.0))
    inputs = case.make_inputs(torch.device("meta"))
    problems: set = set()
    arm = tune._with_tiles(case.arms[FASTADAPT](inputs), tiles, backward, problems)
    with as_on_cuda(), recording() as forward:
        result = arm.forward(0)
    with as_on_cuda(), recording() as back:
        arm.backward(result)
    warps = [{launch.meta.get("num_warps") for launch in launches} for launches in (forward, back)]
    assert (2 in warps[0], 2 in warps[1]) == (not backward, backward)
    assert {problem.backward for problem in problems} == {backward}
