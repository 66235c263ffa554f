"""One case: verify every arm, then time those that are right, in turn, in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from bench import memory, nvml
from bench.case import AGAIN, COMPILED, FASTADAPT, FROZEN, Arm, Case
from bench.ceilings import roofline
from bench.clocks import Sampler, Step
from bench.counters import counting
from bench.meta import as_on_cuda
from bench.rows import Recorder, Row
from bench.stats import summary

WARM_UP = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 60

Tick = Callable[[str, float], None]  # told what is about to happen, and what part of the whole is done


def ignore(what: str, done: float) -> None:
    """A Tick that tells nobody."""


def prepare(
    case: Case, names: Iterable[str], inputs: Any, record: Recorder, skip: Mapping[str, str] = {}, tick: Tick = ignore
) -> dict[str, Arm]:
    """The arms of these names that can be built and are right; a row for every one, right or not.

    skip: arms that cannot run, and why.
    """
    arms = {}
    names = list(names)
    for i, name in enumerate(names):
        if name in skip:
            record("verify", case.name, name, status="skipped", reason=skip[name], params=case.params)
            continue
        tick(f"verifying {name}", i / len(names))
        if (arm := _verified(case, name, inputs, record)) is not None:
            arms[name] = arm
    return arms


def measure(
    case: Case,
    arms: Mapping[str, Arm],
    clocks: Mapping[str, Callable[[Step], Sampler]],
    seconds: float,
    record: Recorder,
    ceilings: dict[str, float],
    seed: int = 0,
    tick: Tick = ignore,
) -> list[Row]:
    """Time arms that `prepare` let through: a row for each, with every phase and clock.  fastadapt is sampled twice.

    seconds: for each phase and clock, though at least MIN_ROUNDS rounds are taken.
    """
    if FASTADAPT in arms:
        arms = {**arms, AGAIN: arms[FASTADAPT]}
    if torch.cuda.is_available():
        _record_peaks(case, arms, record)
    rows = []
    cells = list(itertools.product(case.work, clocks.items()))
    for i, (phase, (clock, prepare_sampler)) in enumerate(cells):

        def told(what: str, done: float, before: float = i) -> None:
            tick(what, (before + done) / len(cells))

        samplers = _warm(case, arms, phase, clock, prepare_sampler, record, told)
        read = nvml.sensor()
        before = read()
        samples = interleave(
            samplers, seconds, np.random.default_rng(seed), partial(told, f"timing the {phase}, {clock} clock")
        )
        device = nvml.around(before, read())
        for name, taken in samples.items():
            values = _values(case, name, phase, taken, ceilings)
            fields = {"params": case.params, "clock": clock, "phase": phase, "values": values, "device": device}
            rows.append(record("time", case.name, name, samples=taken, **fields))
    return rows


def count(case: Case, record: Recorder, tick: Tick = ignore) -> None:
    """Kernel launches and bytes kept for the backward: of the GPU if there is one, else of the meta device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    if device.type == "meta" and case.autocast:
        reason = "without a GPU launches and bytes are counted on the meta device, which has no autocast"
        record("launches", case.name, "", params=case.params, status="skipped", reason=reason)
        return
    inputs = case.make_inputs(device)
    names = [name for name in case.arms if name != COMPILED]  # what Inductor fuses and keeps is decided on the device
    for i, name in enumerate(names):
        tick(f"counting {name}", i / len(names))
        try:
            saved, launches = _count(case.arms[name], inputs)
        except Exception as error:  # the row says so and the other arms go on
            record("launches", case.name, name, params=case.params, **_failure(error))
            continue
        record("saved", case.name, name, params=case.params, values={"saved_bytes": saved})
        record("launches", case.name, name, params=case.params, values=launches)


def _count(build: Callable[[Any], Arm], inputs: Any) -> tuple[int, dict[str, Any]]:
    with as_on_cuda() if inputs.device.type == "meta" else nullcontext():
        arm = build(inputs)
        saved = memory.saved_bytes(lambda: arm.forward(0), arm.constants)
        with counting() as forward:
            result = arm.forward(0)
        with counting() as backward:
            arm.backward(result)
    both = forward.torch + backward.torch + forward.triton + backward.triton
    return saved, {
        "forward_count": forward.total,
        "backward_count": backward.total,
        "total_count": both.total(),
        "triton_count": (forward.triton + backward.triton).total(),
        "kernels": dict(both.most_common()),
    }


def _verified(case: Case, name: str, inputs: Any, record: Recorder) -> Arm | None:
    try:
        arm = case.arms[name](inputs)
        verdicts = case.verify(name, arm, inputs)
    except Exception as error:  # whatever it is, the row says so and the other arms go on
        record("verify", case.name, name, params=case.params, **_failure(error))
        return None
    for against, verdict in verdicts.items():
        outcome = {"status": "ok"} if verdict.ok else {"status": "failed", "reason": verdict.reason}
        record("verify", case.name, name, params=case.params, phase=against, values=verdict.values(), **outcome)
    return arm if all(verdict.ok for verdict in verdicts.values()) else None


def _warm(
    case: Case,
    arms: Mapping[str, Arm],
    phase: str,
    clock: str,
    prepare_sampler: Callable[[Step], Sampler],
    record: Recorder,
    tick: Tick,
) -> dict[str, Sampler]:
    samplers = {}
    for name, arm in arms.items():
        tick(f"warming up {name}", 0.0)
        try:
            sampler = prepare_sampler(arm.step(phase))
            for _ in range(WARM_UP):
                sampler()
            samplers[name] = sampler
        except Exception as error:  # such as a step that a CUDA graph cannot capture: the row says so
            record("time", case.name, name, params=case.params, clock=clock, phase=phase, **_failure(error))
    return samplers


def _values(case: Case, name: str, phase: str, samples: Sequence[float], ceilings: dict[str, float]) -> dict[str, Any]:
    """A time row's numbers: the summary, and how near it is to what the machine's ceilings allow."""
    found = summary(samples)
    values: dict[str, Any] = {"n_count": found.n, "median_s": found.median, "p20_s": found.p20, "p80_s": found.p80}
    work = case.work[phase]
    if work is not None and name != FROZEN:  # the frozen model does less than the case asks for
        floor = roofline(work.flops, work.bytes_min, case.dtype, ceilings)
        values |= {
            "flops": work.flops,
            "bytes_min": work.bytes_min,
            "floor_s": floor,
            "roofline_ratio": floor / found.median,
        }
    return values


def interleave(
    samplers: Mapping[str, Sampler], seconds: float, rng: np.random.Generator, tell: Callable[[float], None]
) -> dict[str, list[float]]:
    """Sample every arm once a round, in a new random order each round, until the seconds or MAX_ROUNDS are used up."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    start = time.perf_counter()
    for round_ in range(MAX_ROUNDS if names else 0):
        elapsed = time.perf_counter() - start
        if round_ >= MIN_ROUNDS and elapsed > seconds:
            break
        tell(min(1.0, elapsed / seconds))
        for name in rng.permutation(names):
            samples[name].append(samplers[name]())
    return samples


def _record_peaks(case: Case, arms: Mapping[str, Arm], record: Recorder) -> None:
    phase = list(case.work)[-1]
    for name, arm in arms.items():
        step = arm.step(phase)
        step(0)
        record("saved", case.name, name, params=case.params, phase=phase, values=memory.peak_bytes(lambda: step(0)))


def _failure(error: Exception) -> dict[str, str]:
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return {
        "status": "oom" if out_of_memory else "failed",
        "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}",
    }
