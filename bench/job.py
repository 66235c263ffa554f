"""The jobs: `main` is `make bench`, `operations` measures single operations, `methods` whole methods.  All leave a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import ceilings, compiled, counters, report
from bench.case import COMPILED, Case
from bench.cases import OPERATIONS, clip_lora, method_cases, model_cases, operation_cases
from bench.clocks import CLOCKS
from bench.provenance import collect
from bench.rows import Recorder, Row
from bench.run import SEED, Session, Tick
from bench.summary import operation
from bench.terminal import Bar
from fastadapt.models.common.method import METHODS

# the cases whose bytes and launches are counted, on any machine
COUNTED = (("bfloat16", 32), ("bfloat16", 32, "gelu"), ("float32 under bfloat16 autocast", 32))
SECONDS = {"cpu": 60.0, "cuda": 5.0}  # of timing for each phase and clock of a training step
OPERATION_SECONDS = {"cpu": 2.0, "cuda": 0.7}
FIRST_ALONE = "on a CPU an operation's first case alone is compiled, which takes longer than all else"
COMPILE_BUDGET = 120.0
STATIC_BUDGET = 120.0
STATIC_ARCHS = (90, 80, 100, 89, 120)  # compute capabilities, the first ones first should time run out


def main(out: Path, console: Console) -> list[Row]:
    """Prove, count and measure LoRA on CLIP ViT-B/16; write rows.jsonl and index.html in `out`; return the rows."""
    device = _device()
    config = {"job": "main", "seconds": SECONDS, "counted": COUNTED, "architecture": clip_lora.ARCHITECTURE}
    record = recorder(out, device, config)
    with Bar(console) as bar, tempfile.TemporaryDirectory() as scratch:
        with bar.stage("measure this machine's ceilings", 0.02):
            session = _session(device, record, bar)
        with bar.stage("count launches and kept bytes", 0.03):
            for setting in COUNTED:
                session.count(clip_lora.case(*setting))
        with bar.stage("measure host time", 0.02):
            _host_time(record)
        with bar.stage("compile the kernels for every architecture, read their machine code", 0.15):
            _static_table(Path(scratch), record, bar)
        cases = model_cases(device.type)
        for case in cases.values():
            _training_step(case, device, session, bar, 0.77 / len(cases), Path(scratch))
        with bar.stage("draw the report", 0.01):
            return report.write(out)


def _training_step(case: Case, device: torch.device, session: Session, bar: Bar, share: float, scratch: Path) -> None:
    inputs = case.make_inputs(device)
    with bar.stage(f"{case.name}: prove outputs and gradients", 0.2 * share):
        arms = session.prepare(case, [arm for arm in case.arms if arm != COMPILED], inputs)
    with bar.stage(f"{case.name}: torch.compile", 0.3 * share):
        skip = _try_compiling(case, device, scratch, session.record)
        arms |= session.prepare(case, [COMPILED], inputs, skip)
    with bar.stage(f"{case.name}: time the training step", 0.5 * share):
        session.measure(case, arms, SECONDS[device.type])


def operations(out: Path, operations: Sequence[str], names: Sequence[str], console: Console) -> list[Row]:
    """Measure single operations, all or those named: all of their cases for this kind of machine, or those named.

    Launches and kept bytes are counted at a GPU's shapes on any machine.
    """
    device = _device()
    _check("op", operations, OPERATIONS)
    cases = operation_cases(device.type, operations or OPERATIONS)
    _check("case", names, cases)
    chosen = [cases[name] for name in names] or list(cases.values())
    first = {operation(case.name): case.name for case in reversed(chosen)}
    config = {"job": "operations", "seconds": OPERATION_SECONDS, "cases": [case.params for case in chosen]}
    record = recorder(out, device, config)
    with Bar(console) as bar:
        with bar.stage("measure this machine's ceilings", 0.04):
            session = _session(device, record, bar)
        with bar.stage("count launches and kept bytes", 0.1):
            for case in chosen if names else operation_cases("cuda", operations or OPERATIONS).values():
                session.count(case)
        for case in chosen:
            with bar.stage(case.name, 0.85 / len(chosen)):
                skip = {} if device.type == "cuda" or case.name in first.values() else {COMPILED: FIRST_ALONE}
                arms = session.prepare(case, list(case.arms), case.make_inputs(device), skip)
                session.measure(case, arms, OPERATION_SECONDS[device.type])
        with bar.stage("draw the report", 0.01):
            return report.write(out)


def methods(out: Path, names: Sequence[str], console: Console) -> list[Row]:
    """Measure training steps of the methods, all or those named.

    Launches and kept bytes are counted at the papers' sizes on any machine.
    """
    device = _device()
    _check("method", names, METHODS)
    names = names or list(METHODS)
    cases = method_cases(device.type, names).values()
    record = recorder(out, device, {"job": "methods", "seconds": SECONDS, "cases": [case.params for case in cases]})
    with Bar(console) as bar, tempfile.TemporaryDirectory() as scratch:
        with bar.stage("measure this machine's ceilings", 0.04):
            session = _session(device, record, bar)
        with bar.stage("count launches and kept bytes", 0.1):
            for case in method_cases("cuda", names).values():
                session.count(case)
        for case in cases:
            _training_step(case, device, session, bar, 0.85 / len(cases), Path(scratch))
        with bar.stage("draw the report", 0.01):
            return report.write(out)


def _check(argument: str, names: Sequence[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{argument}: expected some of\n  " + "\n  ".join(known) + f"\ngot {', '.join(unknown)}")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recorder(out: Path, device: torch.device, config: dict[str, Any]) -> Recorder:
    """A Recorder into out/rows.jsonl for a run that starts now."""
    run_name = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Recorder(out / "rows.jsonl", run_name, collect(device, SEED, config))


def _session(device: torch.device, record: Recorder, tick: Tick) -> Session:
    limits = ceilings.measure(device)
    record("ceiling", "machine", "", values=limits)
    return Session(record, CLOCKS[device.type], limits, tick)


def _host_time(record: Recorder) -> None:
    for dropout in (0.0, clip_lora.DROPOUT):
        found = counters.host_overhead(dropout)
        values = {"frozen_us": found.frozen_us, "peft_us": found.peft_us, "fastadapt_us": found.fastadapt_us}
        values["operation_us"] = found.operation_us
        record("host", "one small linear on the CPU", "", params={"dropout": dropout}, values=values)


def _try_compiling(case: Case, device: torch.device, scratch: Path, record: Recorder) -> dict[str, str]:
    """Record how long compiling took; the arm to skip, and why, if it came to nothing."""
    seconds, reason = compiled.start(case.name, device.type, scratch / "inductor").result(COMPILE_BUDGET)
    outcome = {"status": "skipped", "reason": reason} if reason else {}
    record("compile", case.name, COMPILED, params=case.params, values={"compile_s": seconds}, **outcome)
    return {COMPILED: reason} if reason else {}


def _static_table(scratch: Path, record: Recorder, tick: Tick) -> None:
    """Rows of machine code, one architecture after another until the budget is used up.

    Kernels compile only where Triton does not interpret, so each comes from a process of its own.
    """
    end = time.perf_counter() + STATIC_BUDGET
    for i, arch in enumerate(STATIC_ARCHS):
        tick(f"sm_{arch}", i / len(STATIC_ARCHS))
        path = scratch / f"sm_{arch}.json"
        command = [sys.executable, "-m", "fastadapt.prove.static", "--arch", str(arch), "--json", str(path)]
        environment, left = os.environ | {"TRITON_INTERPRET": "0"}, max(0.0, end - time.perf_counter())
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            reason = f"not within the {STATIC_BUDGET:.0f} s that all have; {' '.join(command[1:5])} makes it"
            record("static", f"sm_{arch}", "", status="skipped", reason=reason)
            continue
        if path.exists():  # written whether or not a budget is broken
            for line in json.loads(path.read_text()):
                record("static", f"sm_{arch}", "", values=line)
        else:
            reason = (done.stderr.strip().splitlines() or ["it wrote no table and no message"])[-1]
            record("static", f"sm_{arch}", "", status="failed", reason=f"{' '.join(command[1:5])}: {reason}")
