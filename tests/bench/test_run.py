"""A case is verified before it is timed, and one arm's trouble is not another's."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import run
from bench.case import AGAIN, FASTADAPT, PEFT, Arm, Case, Unavailable, Work
from bench.clocks import CLOCKS
from bench.rows import Recorder, Row, read
from fastadapt.prove.judge import Verdict

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 1e9, "float32_flops_per_s": 1e9}


def arm() -> Arm:
    return Arm(forward=lambda i: i, backward=lambda result: result, outputs=lambda dropout: {}, constants=[])


def broken() -> Arm:
    raise torch.OutOfMemoryError("no room for this arm")


def elsewhere() -> Arm:
    raise Unavailable("no such device")


def failing() -> Arm:
    def forward(i: int) -> int:
        raise RuntimeError("cannot run\nfor reasons")

    return Arm(forward=forward, backward=lambda result: result, outputs=lambda dropout: {}, constants=[])


def verdict(name: str) -> Verdict:
    return Verdict({"y": 1.0}, {"y": 0.1}, {"y": 1.0}, "y: error 1" if name == "wrong" else "")


CASE = Case(
    name="case",
    params={"rows": 1},
    dtype=torch.float32,
    autocast=False,
    make_inputs=lambda device: None,
    arms={
        PEFT: lambda inputs: arm(),
        FASTADAPT: lambda inputs: arm(),
        "wrong": lambda inputs: arm(),
        "broken": lambda inputs: broken(),
        "elsewhere": lambda inputs: elsewhere(),
        "failing": lambda inputs: failing(),
    },
    verify=lambda name, arm, inputs: {"dropout 0": verdict(name)},
    work={"forward": Work(1e6, 1e3)},
)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    record = Recorder(tmp_path / "rows.jsonl", "run", {})
    session = run.Session(record, CLOCKS["cpu"], CEILINGS)
    arms = session.prepare(CASE, [*CASE.arms, "absent"], None, skip={"absent": "not installed"})
    session.measure(CASE, arms, seconds=0.01)
    return read(tmp_path / "rows.jsonl")


def test_only_the_right_are_timed(rows: list[Row]) -> None:
    timed = [row.arm for row in rows if row.kind == "time" and row.status == "ok"]
    assert timed == [PEFT, FASTADAPT, AGAIN]


def test_every_failure_has_its_row(rows: list[Row]) -> None:
    found = {(row.arm, row.kind): (row.status, row.reason) for row in rows if row.status != "ok"}
    assert found == {
        ("wrong", "verify"): ("failed", "y: error 1"),
        ("broken", "verify"): ("oom", "OutOfMemoryError: no room for this arm"),
        ("elsewhere", "verify"): ("skipped", "no such device"),
        ("failing", "time"): ("failed", "RuntimeError: cannot run"),
        ("absent", "verify"): ("skipped", "not installed"),
    }


def test_a_time_row_knows_its_clock_its_work_and_its_roofline(rows: list[Row]) -> None:
    row = next(row for row in rows if row.kind == "time" and row.arm == PEFT)
    assert (row.clock, row.phase, row.params) == ("cpu", "forward", {"rows": 1})
    assert row.values["n_count"] == len(row.samples) >= run.MIN_ROUNDS
    assert row.values["floor_s"] == pytest.approx(1e-3)  # arithmetic: 1e6 operations at 1e9 a second
    assert row.values["roofline_ratio"] == pytest.approx(1e-3 / row.values["median_s"])


def test_arms_take_turns_in_a_changing_order() -> None:
    order: list[str] = []

    def sampler(name: str):
        return lambda: order.append(name) or 0.0

    samples = run.interleave({name: sampler(name) for name in "abc"}, 1e-9, np.random.default_rng(0), lambda done: None)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(taken) == ["a", "b", "c"] for taken in rounds)
    assert len(set(rounds)) > 1
    assert {len(taken) for taken in samples.values()} == {run.MIN_ROUNDS}


def test_a_step_sees_every_set_of_inputs() -> None:
    seen: list[int] = []
    sample = CLOCKS["cpu"]["cpu"](seen.append)
    for _ in itertools.repeat(None, 7):
        sample()
    assert seen == [0, 1, 2, 3, 4, 0, 1]


def test_an_arm_without_room_for_a_step_leaves_the_peaks_of_the_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run.memory, "peak_bytes", lambda step: {"peak_bytes": 7})
    session = run.Session(Recorder(tmp_path / "rows.jsonl", "run", {}), CLOCKS["cpu"], CEILINGS)
    session._record_peaks(CASE, {"failing": failing(), PEFT: arm()})
    found = {row.arm: (row.status, row.reason, row.values) for row in read(tmp_path / "rows.jsonl")}
    assert found["failing"][:2] == ("failed", "RuntimeError: cannot run")
    assert found[PEFT] == ("ok", "", {"peak_bytes": 7})
