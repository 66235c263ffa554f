"""One LoRA linear by each arm, eager wall time.

`pytest bench/micro --benchmark-autosave` keeps a result, `--benchmark-compare --benchmark-compare-fail=median:10%`
fails on a regression against it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bench.case import COMPILED, Arm
from bench.cases import REDUCED, VIT
from bench.cases.lora_linear import Shape, case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Shape(VIT, 768, 768) if DEVICE.type == "cuda" else Shape(REDUCED, 768, 768, precision="fp32")
CASE = case(SHAPE)
ARMS = [arm for arm in CASE.arms if arm != COMPILED]  # compiling is measured by `python -m bench ops`


@cache
def verified(name: str) -> Arm:
    """The arm, once it has been shown to be right."""
    inputs = shared_inputs()
    arm = CASE.arms[name](inputs)
    reasons = [verdict.reason for verdict in CASE.verify(name, arm, inputs).values() if not verdict.ok]
    assert not reasons, reasons
    return arm


@cache
def shared_inputs() -> Any:
    return CASE.make_inputs(DEVICE)


@pytest.mark.parametrize("phase", list(CASE.work))
@pytest.mark.parametrize("name", ARMS)
def test_step(benchmark: Any, name: str, phase: str) -> None:
    step = verified(name).step(phase)

    def run() -> None:
        step(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{SHAPE.name}, {phase}"
    benchmark.extra_info.update(CASE.params, arm=name, device=DEVICE.type)
    benchmark.pedantic(run, rounds=30, iterations=1, warmup_rounds=3)
