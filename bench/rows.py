"""The rows a run leaves behind: JSON lines, appended and never rewritten."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
KINDS = ("verify", "time", "saved", "launches", "host", "compile", "ceiling", "static", "prediction")
STATUSES = ("ok", "failed", "oom", "skipped")


@dataclass(frozen=True)
class Row:
    """One fact about one arm of one case.

    run: the run it belongs to; rows of different runs are never compared.
    kind: what was found out, one of KINDS; status: one of STATUSES, with the reason for anything but "ok".
    case, arm: what was measured; params: shape, dtype, rank, dropout of the case.
    clock, phase: of a time row, which clock and which part of the step.
    values: numbers by name, each name ending in its unit (s, us, bytes, count, flops, ratio); samples: seconds, one
        per round.
    device: clocks, power and temperature around the measurement, empty where nothing reports them.
    provenance: what the numbers depend on that is not in the row.
    """

    run: str
    kind: str
    case: str
    arm: str
    status: str = "ok"
    reason: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    clock: str = ""
    phase: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {self.status!r}")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"reason: expected why the row is {self.status!r}, got nothing")


@dataclass(frozen=True)
class Recorder:
    """Appends rows to `path`, each with the run's name and provenance."""

    path: Path
    run: str
    provenance: dict[str, Any]

    def __call__(self, kind: str, case: str, arm: str, **fields: Any) -> Row:
        row = Row(self.run, kind, case, arm, provenance=self.provenance, **fields)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), allow_nan=False, default=str) + "\n")
        return row


def read(path: Path) -> list[Row]:
    """Every row of a file, oldest first.

    Raises ValueError for a line of another schema, naming the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = json.loads(line)
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"{path}, line {number}: expected a row of schema {SCHEMA}, got {fields.get('schema')!r}")
        rows.append(Row(**fields))
    return rows


def last_run(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run that wrote last: arms of one plot must share a run."""
    rows = list(rows)
    return [row for row in rows if row.run == rows[-1].run]
