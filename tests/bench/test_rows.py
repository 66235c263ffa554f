"""Rows come back as they were written, and nothing written is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.rows import Recorder, Row, last_run, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "rows.jsonl"


def test_round_trip(path: Path) -> None:
    record = Recorder(path, "run", {"seed": 0})
    written = record("time", "case", "PEFT", clock="cpu", values={"median_s": 0.5}, samples=[0.5, 0.6])
    assert read(path) == [written]
    assert written.provenance == {"seed": 0}


def test_rows_are_appended(path: Path) -> None:
    Recorder(path, "first", {})("saved", "case", "PEFT")
    before = path.read_text()
    Recorder(path, "second", {})("saved", "case", "PEFT")
    assert path.read_text().startswith(before)
    assert [row.run for row in read(path)] == ["first", "second"]
    assert [row.run for row in last_run(read(path))] == ["second"]


def test_a_failure_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason: expected why the row is 'failed'"):
        Row("run", "time", "case", "PEFT", status="failed")


@pytest.mark.parametrize("field, value", [("kind", "vibes"), ("status", "fine")])
def test_unknown_words_are_errors(field: str, value: str) -> None:
    fields = {"run": "run", "kind": "time", "case": "case", "arm": "PEFT", field: value}
    with pytest.raises(ValueError, match=f"{field}: expected one of .* got '{value}'"):
        Row(**fields)


def test_infinities_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Recorder(path, "run", {})("time", "case", "PEFT", values={"median_s": float("inf")})


def test_another_schema_is_named(path: Path) -> None:
    Recorder(path, "run", {})("saved", "case", "PEFT")
    with path.open("a") as file:
        file.write(json.dumps({"schema": 99}) + "\n")
    with pytest.raises(ValueError, match="line 2: expected a row of schema 1, got 99"):
        read(path)
