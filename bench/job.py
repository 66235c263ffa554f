"""The jobs: `main` is `make bench`, `operations` measures single operations.  Both leave rows and a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import ceilings, compiled, counters, report, run, terminal
from bench.case import COMPILED, Case
from bench.cases import clip_lora, model_cases, operation_cases
from bench.clocks import CLOCKS
from bench.provenance import collect
from bench.rows import Recorder, Row

SEED = 0
COUNTED = (("bfloat16", 32), ("bfloat16", 32, "gelu"))  # the cases whose bytes and launches are counted, on any machine
SECONDS = {"cpu": 75.0, "cuda": 5.0}  # of timing for each phase and clock of a training step
OPERATION_SECONDS = {"cpu": 4.0, "cuda": 0.7}
COMPILE_BUDGET = 120.0
STATIC_BUDGET = 150.0


def main(out: Path, console: Console) -> list[Row]:
    """Prove, count and measure LoRA on CLIP ViT-B/16; write rows.jsonl and index.html in `out`; return the rows."""
    device = _device()
    config = {"job": "main", "seconds": SECONDS, "counted": COUNTED, "architecture": clip_lora.ARCHITECTURE}
    record = recorder(out, device, config)
    with terminal.Bar(console) as bar, tempfile.TemporaryDirectory() as scratch:
        with bar.stage("count launches and kept bytes", 0.03):
            for setting in COUNTED:
                run.count(clip_lora.case(*setting), record, bar)
        with bar.stage("compile the kernels for every architecture and read their machine code", 0.15):
            _static_table(Path(scratch), record)
        with bar.stage("measure this machine's ceilings", 0.02):
            limits = _ceilings(device, record)
        with bar.stage("measure host time", 0.02):
            _host_time(record)
        cases = model_cases(device.type)
        for case in cases.values():
            _training_step(case, device, 0.77 / len(cases), record, limits, Path(scratch), bar)
        with bar.stage("draw the report", 0.01):
            return report.write(out)


def _training_step(
    case: Case,
    device: torch.device,
    share: float,
    record: Recorder,
    limits: dict[str, float],
    scratch: Path,
    bar: terminal.Bar,
) -> None:
    inputs = case.make_inputs(device)
    with bar.stage(f"{case.name}: prove outputs and gradients against float64", 0.2 * share):
        arms = run.prepare(case, [arm for arm in case.arms if arm != COMPILED], inputs, record, tick=bar)
    with bar.stage(f"{case.name}: torch.compile PEFT, in a process of its own first", 0.3 * share):
        skip = _try_compiling(case, device, scratch, record)
        arms |= run.prepare(case, [COMPILED], inputs, record, skip, bar)
    with bar.stage(f"{case.name}: time the training step", 0.5 * share):
        run.measure(case, arms, CLOCKS[device.type], SECONDS[device.type], record, limits, SEED, bar)


def operations(out: Path, names: Sequence[str], console: Console) -> list[Row]:
    """Measure single operations: all cases of this machine's kind, or those named."""
    device = _device()
    cases = operation_cases(device.type)
    if unknown := [name for name in names if name not in cases]:
        raise ValueError("case: expected some of\n  " + "\n  ".join(cases) + f"\ngot {', '.join(unknown)}")
    chosen = [cases[name] for name in names] or list(cases.values())
    record = recorder(
        out, device, {"job": "operations", "seconds": OPERATION_SECONDS, "cases": [case.params for case in chosen]}
    )
    with terminal.Bar(console) as bar:
        with bar.stage("measure the machine's ceilings", 0.04):
            limits = _ceilings(device, record)
        for case in chosen:
            with bar.stage(case.name, 0.95 / len(chosen)):
                _operation(case, device, record, limits, bar)
        with bar.stage("draw the report", 0.01):
            return report.write(out)


def _operation(case: Case, device: torch.device, record: Recorder, limits: dict[str, float], bar: terminal.Bar) -> None:
    run.count(case, record)
    arms = run.prepare(case, case.arms, case.make_inputs(device), record, tick=bar)
    run.measure(case, arms, CLOCKS[device.type], OPERATION_SECONDS[device.type], record, limits, SEED, bar)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recorder(out: Path, device: torch.device, config: dict[str, Any]) -> Recorder:
    """A Recorder into out/rows.jsonl for a run that starts now."""
    run_name = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Recorder(out / "rows.jsonl", run_name, collect(device, SEED, config))


def _ceilings(device: torch.device, record: Recorder) -> dict[str, float]:
    limits = ceilings.measure(device)
    record("ceiling", "machine", "", values=limits)
    return limits


def _host_time(record: Recorder) -> None:
    for dropout in (0.0, clip_lora.DROPOUT):
        found = counters.host_overhead(dropout)
        values = {"frozen_us": found.frozen_us, "peft_us": found.peft_us, "fastadapt_us": found.fastadapt_us}
        record("host", "one small linear on the CPU", "", params={"dropout": dropout}, values=values)


def _try_compiling(case: Case, device: torch.device, scratch: Path, record: Recorder) -> dict[str, str]:
    """Record how long compiling took; the arm to skip, and why, if it came to nothing."""
    seconds, reason = compiled.start(case.name, device.type, scratch / "inductor").result(COMPILE_BUDGET)
    outcome = {"status": "skipped", "reason": reason} if reason else {}
    record("compile", case.name, COMPILED, params=case.params, values={"compile_s": seconds}, **outcome)
    return {COMPILED: reason} if reason else {}


def _static_table(scratch: Path, record: Recorder) -> None:
    """Kernels compile only in a process whose Triton does not interpret, so the table comes from one."""
    path = scratch / "static.json"
    command = [sys.executable, "-m", "fastadapt.prove.static", "--json", str(path)]
    try:
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=STATIC_BUDGET)
        reason = "" if path.exists() else (done.stderr.strip().splitlines() or ["it wrote no table and no message"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"not finished within {STATIC_BUDGET:.0f} s"
    if reason:
        record("static", "kernels", "", status="failed", reason=f"python -m fastadapt.prove.static: {reason}")
        return
    for line in json.loads(path.read_text()):
        record("static", "kernels", "", values=line)
