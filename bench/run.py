"""One case: verify every arm, then time those that are right, in turn, in this process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bench import memory, nvml
from bench.case import AGAIN, COMPILED, FASTADAPT, FROZEN, Arm, Case, Unavailable
from bench.ceilings import roofline
from bench.clocks import Sampler, Step
from bench.counters import counting
from bench.meta import as_on_cuda
from bench.rows import Recorder, Row
from bench.stats import summary

SEED = 0
WARM_UP = 1
MIN_ROUNDS, MAX_ROUNDS = 5, 60

Tick = Callable[[str, float], None]  # told what is about to happen, and what part of the whole is done


def _ignore(what: str, done: float) -> None:
    """A Tick that tells nobody."""


@dataclass(frozen=True)
class Session:
    """One run on one machine.

    record: where rows go; clocks: a Sampler's maker by name; ceilings: as measured in this run; tick: told how it goes.
    """

    record: Recorder
    clocks: Mapping[str, Callable[[Step], Sampler]]
    ceilings: Mapping[str, float]
    tick: Tick = _ignore

    def count(self, case: Case) -> None:
        """Record kernel launches and bytes kept for the backward, on the GPU if there is one, else on meta."""
        device = torch.device("cuda" if torch.cuda.is_available() else "meta")
        inputs = case.make_inputs(device)
        names = [name for name in case.arms if name != COMPILED]  # what Inductor fuses and keeps shows only on a device
        for i, name in enumerate(names):
            self.tick(f"counting {name}", i / len(names))
            try:
                saved, launches = _count(case.arms[name], inputs)
            except Exception as error:  # the row says so and the other arms go on
                self.record("launches", case.name, name, params=case.params, **_failure(error))
                continue
            self.record("saved", case.name, name, params=case.params, values={"saved_bytes": saved})
            self.record("launches", case.name, name, params=case.params, values=launches)

    def prepare(
        self, case: Case, names: Sequence[str], inputs: Any, skip: Mapping[str, str] | None = None
    ) -> dict[str, Arm]:
        """The arms of these names that can be built and are right; a row for every one, right or not.

        skip: arms that cannot run, and why.
        """
        arms = {}
        for i, name in enumerate(names):
            self.tick(f"verifying {name}", i / len(names))
            if skip and name in skip:
                self.record("verify", case.name, name, status="skipped", reason=skip[name], params=case.params)
            elif (arm := self._verified(case, name, inputs)) is not None:
                arms[name] = arm
        return arms

    def measure(self, case: Case, arms: Mapping[str, Arm], seconds: float) -> list[Row]:
        """Time arms that `prepare` let through: a row for each, phase and clock.  fastadapt is sampled as two arms.

        seconds: for each phase and clock, though at least MIN_ROUNDS rounds are taken.
        """
        if FASTADAPT in arms:
            arms = {**arms, AGAIN: arms[FASTADAPT]}
        if torch.cuda.is_available():
            self._record_peaks(case, arms)
        rows = []
        for phase, clock in itertools.product(case.work, self.clocks):
            samplers = self._warm(case, arms, phase, clock)
            read = nvml.sensor()
            before = read()
            tell = partial(self.tick, f"timing the {phase}, {clock} clock")
            samples = interleave(samplers, seconds, np.random.default_rng(SEED), tell)
            device = nvml.around(before, read())
            for name, taken in samples.items():
                fields = {"params": case.params, "clock": clock, "phase": phase, "device": device}
                values = self._values(case, name, phase, taken)
                rows.append(self.record("time", case.name, name, values=values, samples=taken, **fields))
        return rows

    def _verified(self, case: Case, name: str, inputs: Any) -> Arm | None:
        try:
            arm = case.arms[name](inputs)
            verdicts = case.verify(name, arm, inputs)
        except Exception as error:  # whatever it is, the row says so and the other arms go on
            self.record("verify", case.name, name, params=case.params, **_failure(error))
            return None
        for against, verdict in verdicts.items():
            outcome = {} if verdict.ok else {"status": "failed", "reason": verdict.reason}
            fields = {"params": case.params, "phase": against, "values": verdict.values()}
            self.record("verify", case.name, name, **fields, **outcome)
        return arm if all(verdict.ok for verdict in verdicts.values()) else None

    def _warm(self, case: Case, arms: Mapping[str, Arm], phase: str, clock: str) -> dict[str, Sampler]:
        samplers = {}
        for name, arm in arms.items():
            self.tick(f"warming up {name}", 0.0)
            try:
                sampler = self.clocks[clock](arm.step(phase))
                for _ in range(WARM_UP):
                    sampler()
                samplers[name] = sampler
            except Exception as error:  # such as a step that a CUDA graph cannot capture: the row says so
                self.record("time", case.name, name, params=case.params, clock=clock, phase=phase, **_failure(error))
        return samplers

    def _values(self, case: Case, name: str, phase: str, samples: Sequence[float]) -> dict[str, Any]:
        """A time row's numbers: the summary, and how near it is to what the machine's ceilings allow."""
        found = summary(samples)
        values = {"n_count": found.n, "median_s": found.median, "p20_s": found.p20, "p80_s": found.p80}
        work = case.work[phase]
        if work is not None and name != FROZEN:  # the frozen model does less than the case asks for
            floor = roofline(work.flops, work.bytes_min, case.dtype, self.ceilings)
            values |= {"flops": work.flops, "bytes_min": work.bytes_min, "floor_s": floor}
            values |= {"roofline_ratio": floor / found.median}
        return values

    def _record_peaks(self, case: Case, arms: Mapping[str, Arm]) -> None:
        phase = list(case.work)[-1]
        for name, arm in arms.items():
            step = partial(arm.step(phase), 0)
            try:
                step()  # what is allocated once, such as the optimizer's state, is no part of a step
                found = {"values": memory.peak_bytes(step)}
            except Exception as error:  # such as no memory left, which is a result
                found = _failure(error)
            self.record("saved", case.name, name, params=case.params, phase=phase, **found)


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


def _count(build: Callable[[Any], Arm], inputs: Any) -> tuple[int, dict[str, Any]]:
    """Bytes kept, and the values of a launches row."""
    with as_on_cuda() if inputs.device.type == "meta" else nullcontext():
        arm = build(inputs)
        saved = memory.saved_bytes(lambda: arm.forward(0), arm.constants)
        with counting() as forward:
            result = arm.forward(0)
        with counting() as backward:
            arm.backward(result)
    triton = forward.triton + backward.triton
    both = forward.torch + backward.torch + triton
    counts = {"forward": forward.total, "backward": backward.total, "total": both.total(), "triton": triton.total()}
    return saved, {f"{part}_count": count for part, count in counts.items()} | {"kernels": dict(both.most_common())}


def _failure(error: Exception) -> dict[str, str]:
    if isinstance(error, Unavailable):
        return {"status": "skipped", "reason": str(error)}
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    first_line = (str(error).splitlines() or ["no message"])[0]
    return {"status": "oom" if out_of_memory else "failed", "reason": f"{type(error).__name__}: {first_line}"}
