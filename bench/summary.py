"""What a run's rows say side by side.  Pure: rows in, comparisons out; the terminal and the report start here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.case import (
    ADDMM, AGAIN, CHANNELS_LAST, COMPILED, CUDNN_ARMS, EAGER, FASTADAPT, FROZEN, GRAPHED, ONE_BY_ONE, PEFT, RELEASED, SDPA,
    STACKED, STRONG, XFORMERS,
)  # fmt: skip
from bench.rows import Row
from bench.stats import Ratio, ratio
from fastadapt.models.common.method import METHODS

ORDER = (
    FROZEN, PEFT, RELEASED, STRONG, EAGER, SDPA, XFORMERS, CHANNELS_LAST, *CUDNN_ARMS, STACKED, COMPILED, ADDMM, ONE_BY_ONE,
    FASTADAPT, GRAPHED, AGAIN,
)  # fmt: skip
BASELINES = (PEFT, STRONG, RELEASED, EAGER)  # the first of them that a case has is what ratios are given against
COUNTS = (  # kind of row, value, what it is
    ("saved", "saved_bytes", "bytes kept for backward"),
    ("saved", "peak_bytes", "peak of allocated bytes"),
    ("launches", "total_count", "kernel launches"),
)
STEP = "training step"
MAIN_CLOCKS = ("cpu", "wall")  # what a user waits for


@dataclass(frozen=True)
class Group:
    """The time rows of one case, phase and clock, by arm: what may be compared."""

    case: str
    phase: str
    clock: str
    rows: dict[str, Row]

    @property
    def baseline(self) -> str | None:
        """The arm that ratios are given against; None where none of BASELINES was timed."""
        return next((arm for arm in BASELINES if arm in self.rows), None)

    @property
    def main(self) -> bool:
        """Whether it is the main job's training step, and no method's or single operation's."""
        return self.phase == STEP and operation(self.case) not in METHODS

    def ratio(self, arm: str, to: str) -> Ratio | None:
        """How long `arm` takes in units of `to`; None where either was not timed."""
        if arm not in self.rows or to not in self.rows:
            return None
        return ratio(self.rows[arm].samples, self.rows[to].samples)

    @property
    def noise(self) -> float:
        """How far apart the same arm, measured twice, may lie; 0 where it was not."""
        again = self.ratio(AGAIN, FASTADAPT)
        return again.spread if again else 0.0


@dataclass(frozen=True)
class Comparison:
    """fastadapt beside another arm; verdict as Ratio.sign, '<' meaning that fastadapt takes less."""

    case: str
    what: str
    rival: str
    ratio: Ratio
    verdict: str


def groups(rows: Sequence[Row]) -> list[Group]:
    """Every Group of successful time rows, in the order they were measured."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in of_kind(rows, "time"):
        found.setdefault((row.case, row.phase, row.clock), {})[row.arm] = row
    return [Group(*key, {arm: arms[arm] for arm in ORDER if arm in arms}) for key, arms in found.items()]


def main_group(rows: Sequence[Row]) -> Group | None:
    """The main job's training step by the clock that a user waits for; None if it was not timed."""
    return next((group for group in groups(rows) if group.main and group.clock in MAIN_CLOCKS), None)


def operation(case: str) -> str:
    """The operation that a single operation's case measures: the first word of its name."""
    return case.split()[0]


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The successful rows of a kind."""
    return [row for row in rows if row.kind == kind and row.status == "ok"]


def cases(rows: Sequence[Row], kind: str, value: str) -> list[str]:
    """The cases of successful rows of a kind that have this value, in order."""
    return list(dict.fromkeys(row.case for row in of_kind(rows, kind) if value in row.values))


def by_arm(rows: Sequence[Row], kind: str, value: str) -> dict[str, float]:
    """One value of the successful rows of a kind, by arm; of several cases, the first that has any."""
    having = [row for row in of_kind(rows, kind) if value in row.values]
    found = {row.arm: row.values[value] for row in having if row.case == having[0].case}
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: ORDER.index(arm) if arm in ORDER else len(ORDER))}


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """fastadapt beside every other arm that does the same, in time, bytes kept, launches and host time."""
    found = []
    for group in groups(rows):
        for rival in group.rows:
            against = group.ratio(FASTADAPT, rival)
            if rival not in (FROZEN, FASTADAPT, GRAPHED, AGAIN) and against is not None:
                what = f"{group.phase}, {group.clock} clock"
                found.append(Comparison(group.case, what, rival, against, against.sign(group.noise)))
    for kind, value, what in COUNTS:
        found += _counts(of_kind(rows, kind), value, what)
    for row in of_kind(rows, "host"):
        against = Ratio.exact(row.values["fastadapt_us"] / row.values["peft_us"])
        found.append(Comparison(row.case, "host time over a frozen linear", PEFT, against, against.sign()))
    return found


def _counts(rows: Sequence[Row], value: str, what: str) -> list[Comparison]:
    having = [row for row in rows if value in row.values]
    ours = {row.case: row.values[value] for row in having if row.arm == FASTADAPT}
    found = []
    for row in having:
        # what keeps nothing for a backward is no unit
        if row.arm not in (FROZEN, FASTADAPT, GRAPHED, AGAIN) and row.case in ours and row.values[value]:
            against = Ratio.exact(ours[row.case] / row.values[value])
            found.append(Comparison(row.case, what, row.arm, against, against.sign()))
    return found


def failures(rows: Sequence[Row]) -> list[Row]:
    """Every row that is not a success: failed, out of memory or skipped, with its reason."""
    return [row for row in rows if row.status != "ok"]
