"""Whether every kernel is right on this machine: on its GPU, or without one under Triton's interpreter.

`python -m fastadapt.prove.verify` prints a line for each check, and fails if one does.  Every call is made twice, in
memory filled with NaN; it must give the same bits twice, about as near to float64 as eager torch in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastadapt.core.backend import WHY_NOT
from fastadapt.core.launch import interpreting
from fastadapt.prove.cases import Cases, operations
from fastadapt.prove.judge import judge, mean, poisoned
from fastadapt.prove.process import rerun_unless_interpreting

# how much further off than eager a call may be: float32 sums in another order, TF32 rounds in another way
SLACK = 2.0


@dataclass(frozen=True)
class Check:
    """One check: errors to float64 (root mean square over outputs and gradients), if any; what is wrong, if so."""

    operation: str
    backend: str
    what: str
    error: float | None = None
    eager_error: float | None = None
    reason: str = ""


def backends(cases: Cases, device: torch.device) -> list[str]:
    """The operation's backends that can run on this device, but for the reference, which the others are compared with."""
    return [name for name in cases.BACKENDS if not WHY_NOT[name](device, torch.float32)]


def check_values(cases: Cases, case: Any, device: torch.device, backend: str) -> dict[str, Any]:
    """Outputs and gradients of a case: right, complete, and the same bits twice."""
    torch.manual_seed(0)
    tensors = cases.inputs(case, device)
    doubles = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    with poisoned():
        first, second = (cases.run(case, tensors, backend) for _ in range(2))
    eager, exact = cases.run(case, tensors, "reference"), cases.run(case, doubles, "reference")
    coarsest = max((tensor.dtype for tensor in eager.values()), key=lambda dtype: torch.finfo(dtype).eps)
    verdict = judge(first, eager, exact, coarsest, SLACK, roundings=1)
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    return {
        "error": mean(verdict.errors.values()),
        "eager_error": mean(verdict.eager_errors.values()),
        "reason": verdict.reason or (f"{', '.join(changed)}: two calls differ" if changed else ""),
    }


def check_masks(cases: Cases, device: torch.device, backend: str) -> dict[str, Any]:
    """Dropout's masks: those that core.philox defines."""
    wrong = {name: int((seen != mask).sum()) for name, (seen, mask) in cases.masks(device, backend).items()}
    return {"reason": "; ".join(f"{name}: {count} elements differ" for name, count in wrong.items() if count)}


def run(
    table: Mapping[str, Cases],
    device: torch.device,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Check]:
    """All checks of these operations on a device: every case, and every mask, with every backend that can run there."""
    todo: list[tuple[str, str, str, Callable[[], dict[str, Any]]]] = []
    for name, cases in table.items():
        for backend in backends(cases, device):
            if hasattr(cases, "masks"):
                todo.append((name, backend, "dropout masks", partial(check_masks, cases, device, backend)))
            for case in (*cases.EDGES, *(cases.SHIPPED if device.type == "cuda" else ())):
                todo.append((name, backend, case.name, partial(check_values, cases, case, device, backend)))
    return [Check(*labels, **_outcome(check)) for *labels, check in progress(todo)]


def _outcome(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return check()
    except Exception as error:  # whatever it is, the table says so and the other checks go on
        return {"reason": f"{type(error).__name__}: {error}"}


def summary(checks: Sequence[Check], where: str) -> Table:
    """A line for each check."""
    shown = Table(title=f"Right on this machine? {where}", box=SIMPLE_HEAD, padding=0)
    for column in ("operation", "backend", "what"):
        shown.add_column(column)
    for column in ("error", "eager", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for check in checks:
        errors = ("-" if error is None else f"{error:.1e}" for error in (check.error, check.eager_error))
        verdict = "[red]wrong[/red]" if check.reason else "[green]right[/green]"
        shown.add_row(check.operation, check.backend, check.what, *errors, verdict)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, print, and write the checks; the exit status tells whether all of them are right."""
    parser = argparse.ArgumentParser(prog="python -m fastadapt.prove.verify", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the checks")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        rerun_unless_interpreting(True)
    if interpreting():
        from fastadapt.prove import interpreter

        interpreter.install()
    console = Console()
    checks = run(operations(), device, partial(track, description="verify", console=console, transient=True))
    if options.json:
        options.json.write_text(json.dumps([asdict(check) for check in checks], indent=1) + "\n")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, with Triton's kernels interpreted"
    console.print(summary(checks, where))
    wrong = [check for check in checks if check.reason]
    for check in wrong:
        console.print(f"[red]{check.operation}, {check.backend}, {check.what}: {check.reason}[/red]", soft_wrap=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
