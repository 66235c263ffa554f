"""The static table: which launches it is made of, how budgets are applied, and what it prints and writes.

What kernels really compile to is tested in tests/codegen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fastadapt.core.launch import Launch, launch
from fastadapt.kernels.lora_linear import cases as lora_linear
from fastadapt.prove import table
from fastadapt.prove.cases import Cases
from fastadapt.prove.report import Budget, Report

REPORT = Report("a_kernel", 90, 4, 64, 0, 0, 2048, 0, Counter({"HGMMA.64x64x16": 1, "LDG.E.128": 3, "STG.E": 1}))


def kernel() -> None: ...


def operation(sizes: Sequence[int], max_regs: int = 255) -> Cases:
    """An operation with a case a size, of one launch each."""

    def run(case: SimpleNamespace, tensors: dict, backend: str) -> None:
        assert backend == "triton"
        launch(SimpleNamespace(fn=kernel), (case.size, 1), device=tensors["device"], ROWS=case.size, num_warps=4)

    return SimpleNamespace(
        SHIPPED=[SimpleNamespace(name=f"case {size}", size=size) for size in sizes],
        inputs=lambda case, device: {"device": device},
        run=run,
        budget=lambda case, kernel: Budget(max_regs=max_regs),
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a compiler: launches with the same ROWS // 10 are the same machine code."""
    reports: dict[tuple[int, int], Report] = {}

    def compile_launches(pairs: Iterable[tuple[Launch, int]], progress: Callable) -> list[Report]:
        def report(launch: Launch, arch: int) -> Report:
            return reports.setdefault((launch.meta["ROWS"] // 10, arch), replace(REPORT, arch=arch))

        return [report(*pair) for pair in progress(list(pairs))]

    monkeypatch.setattr(table, "compile_launches", compile_launches)


def test_a_case_is_recorded_as_the_architecture_would_run_it() -> None:
    case = lora_linear.SHIPPED[0]
    tiles = {}
    for arch in (80, 90):
        found = table.launches(lora_linear, case, arch)
        assert {launch.name for launch in found} >= {"forward_kernel", "grad_input_kernel", "factor_grads_kernel"}
        tiles[arch] = next(launch.meta["COLUMNS"] for launch in found if launch.name == "forward_kernel")
    assert tiles[80] != tiles[90]


def test_equal_machine_code_is_one_row(compiled: None) -> None:
    rows = table.build({"op": operation([1, 2, 10])}, [90, 80])
    assert [(row.case, row.report.arch) for row in rows] == [
        ("case 1", 90), ("case 10", 90), ("case 1", 80), ("case 10", 80),
    ]  # fmt: skip


def test_a_broken_budget_is_told_once(compiled: None) -> None:
    rows = table.build({"op": operation([1, 2, 10], max_regs=63)}, [90])
    assert [row.violations for row in rows] == [["a_kernel on sm_90: 64 registers per thread, at most 63 allowed"]] * 2


def test_values_are_plain(compiled: None) -> None:
    (row,) = table.build({"op": operation([3])}, [90])
    assert row.values() == {
        "operation": "op", "case": "case 3", "kernel": "a_kernel", "sm": 90, "grid": "3x1",
        "config": "ROWS=3 num_warps=4", "regs": 64, "spills": 0, "local": 0, "shared": 2048, "blocks/SM": 8,
        "warps/SM": 32, "tensor core": "wgmma", "load": 16, "store": 4, "wide loads": 1.0, "violations": "",
    }  # fmt: skip


def printed(rows: Sequence[table.Row]) -> list[list[str]]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table.summary(rows))
    return [line.split() for line in capture.get().splitlines() if "kernel" in line][1:]


def test_the_terminal_sees_the_worst_of_a_kernel(compiled: None) -> None:
    slow = replace(REPORT, regs=200, shared=100_000, mix=REPORT.mix + Counter({"LDL": 7, "LDG.E": 4}))
    rows = table.build({"op": operation([1, 10])}, [90])
    rows[1] = replace(rows[1], report=slow)
    header, line = printed(rows)
    assert header == ["kernel", "sm", "n", "core", "regs", "spills", "KiB", "blocks", "load", "store", "wide"]
    assert line == ["a_kernel", "90", "2", "wgmma", "200", "7", "98", "2", "16", "4", "0.75"]


@pytest.mark.parametrize(("max_regs", "status"), [(64, 0), (63, 1)])
def test_the_command_tells_in_every_way(compiled, monkeypatch, tmp_path, capsys, max_regs: int, status: int) -> None:
    monkeypatch.setattr(table, "operations", lambda: {"op": operation([1], max_regs)})
    monkeypatch.setattr(table, "rerun_unless_interpreting", lambda wanted: None)
    with pytest.raises(SystemExit) as exit_:
        table.main(["--json", str(tmp_path / "rows.json"), "--arch", "80", "90"])
    assert exit_.value.code == status
    written: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    assert [row["sm"] for row in written] == [80, 90]
    assert ("case 1: a_kernel on sm_90: 64 registers" in capsys.readouterr().out) == bool(status)


def test_an_architecture_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        table.main(["--arch", "75"])
    assert exit_.value.code == 2
    assert "invalid choice: 75" in capsys.readouterr().err
