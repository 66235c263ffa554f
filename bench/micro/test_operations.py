"""Each operation by each arm, at its first shape, eager wall time.

`pytest bench/micro --benchmark-autosave` keeps a result, `--benchmark-compare --benchmark-compare-fail=median:10%`
fails on a regression against it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bench.case import COMPILED, Arm, Unavailable
from bench.cases import OPERATIONS, operation_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {operation: next(iter(operation_cases(DEVICE.type, [operation]).values())) for operation in OPERATIONS}
STEPS = [
    (operation, name, phase)
    for operation, case in CASES.items()
    for phase in case.work
    for name in case.arms
    if name != COMPILED  # compiling is measured by `python -m bench ops`
]


@cache
def verified(operation: str, name: str) -> Arm:
    """The arm, once it has been shown to be right."""
    case, inputs = CASES[operation], shared_inputs(operation)
    arm = case.arms[name](inputs)
    reasons = [verdict.reason for verdict in case.verify(name, arm, inputs).values() if not verdict.ok]
    assert not reasons, reasons
    return arm


@cache
def shared_inputs(operation: str) -> Any:
    return CASES[operation].make_inputs(DEVICE)


@pytest.mark.parametrize("operation, name, phase", STEPS)
def test_step(benchmark: Any, operation: str, name: str, phase: str) -> None:
    try:
        step = verified(operation, name).step(phase)
    except Unavailable as error:
        pytest.skip(str(error))

    def run() -> None:
        step(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{CASES[operation].name}, {phase}"
    benchmark.extra_info.update(CASES[operation].params, arm=name, device=DEVICE.type)
    benchmark.pedantic(run, rounds=30, iterations=1, warmup_rounds=3)
