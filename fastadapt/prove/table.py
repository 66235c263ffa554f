"""The static table: what the shipped cases of every operation compile to, for every architecture, without a GPU.

`python -m fastadapt.prove.static` prints it, a line for each kernel and architecture, and fails if a budget is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastadapt.core.launch import Launch, recording, target
from fastadapt.prove.cases import Cases, operations
from fastadapt.prove.process import rerun_unless_interpreting
from fastadapt.prove.report import ARCHS, Report
from fastadapt.prove.static import compile_launches


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one architecture: the first case that launches it, and every bound that it breaks."""

    operation: str
    case: str
    launch: Launch
    report: Report
    violations: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """The row as it goes into a file.  In bytes: shared memory of a block; local memory, accesses of a thread."""
        report = self.report
        return {
            "operation": self.operation,
            "case": self.case,
            "kernel": report.kernel,
            "sm": report.arch,
            "grid": "x".join(map(str, self.launch.grid)),
            "config": " ".join(f"{name}={value}" for name, value in self.launch.meta.items()),
            "regs": report.regs,
            "spills": report.spill_loads + report.spill_stores,
            "local": report.stack + report.local,
            "shared": report.shared,
            "blocks/SM": report.blocks_per_sm,
            "warps/SM": report.warps_per_sm,
            "tensor core": report.tensor_core,
            "load": report.load_bytes,
            "store": report.store_bytes,
            "wide loads": round(report.wide_load_share, 3),
            "violations": "; ".join(self.violations),
        }


def launches(cases: Cases, case: Any, arch: int) -> list[Launch]:
    """The kernel launches of a case, forward and backward, as on a GPU of compute capability `arch`."""
    with target(arch), recording() as log:
        cases.run(case, cases.inputs(case, torch.device("meta")), "triton")
    return log


def build(
    table: Mapping[str, Cases], archs: Iterable[int], progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> list[Row]:
    """A row for every kernel that the shipped cases of these operations compile to; equal machine code is one row."""
    uses = [
        (name, cases, case, arch, launch)
        for arch in archs
        for name, cases in table.items()
        for case in cases.SHIPPED
        for launch in launches(cases, case, arch)
    ]
    reports = compile_launches([(launch, arch) for *_, arch, launch in uses], progress)
    rows: dict[tuple[str, int], Row] = {}
    for (name, cases, case, _, launch), report in zip(uses, reports):
        row = rows.setdefault((name, id(report)), Row(name, case.name, launch, report))
        broken = cases.budget(case, report.kernel).violations(report)
        row.violations.extend(violation for violation in broken if violation not in row.violations)
    return list(rows.values())


def summary(rows: Sequence[Row]) -> Table:
    """A line for each kernel and architecture, with the worst of every column over its variants."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.operation, row.report.kernel, row.report.arch].append(row)
    shown = Table(title="Machine code: the worst of every kernel's variants", box=SIMPLE_HEAD, padding=0)
    shown.add_column("kernel", no_wrap=True)
    for column in ("sm", "n", "core", "regs", "spills", "KiB", "blocks", "load", "store", "wide"):
        shown.add_column(column, justify="right", no_wrap=True)
    for (_, kernel, arch), group in sorted(groups.items()):
        reports = [row.report for row in group]
        shown.add_row(
            kernel,
            str(arch),
            str(len(group)),
            "/".join(sorted({report.tensor_core or "-" for report in reports})),
            str(max(report.regs for report in reports)),
            str(max(report.spill_loads + report.spill_stores for report in reports)),
            f"{max(report.shared for report in reports) / 1024:.0f}",
            str(min(report.blocks_per_sm for report in reports)),
            str(min(report.load_bytes for report in reports)),
            str(min(report.store_bytes for report in reports)),
            f"{min(report.wide_load_share for report in reports):.2f}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print, and write the rows; the exit status tells whether every budget is kept."""
    parser = argparse.ArgumentParser(prog="python -m fastadapt.prove.static", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS), help="compute capabilities")
    options = parser.parse_args(arguments)
    rerun_unless_interpreting(False)
    console = Console()
    rows = build(operations(), options.arch, partial(track, description="compile", console=console, transient=True))
    if options.json:
        options.json.write_text(json.dumps([row.values() for row in rows], indent=1) + "\n")
    console.print(summary(rows))
    violations = [f"{row.case}: {violation}" for row in rows for violation in row.violations]
    for violation in violations:
        console.print(f"[red]{violation}[/red]", soft_wrap=True)
    sys.exit(1 if violations else 0)
