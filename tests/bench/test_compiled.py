"""A compilation that hangs is stopped, one that fails says why."""

from __future__ import annotations

import subprocess
import sys
import time

from bench.compiled import Trial


def trial(code: str) -> Trial:
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return Trial(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True))


def test_seconds_come_from_the_process() -> None:
    assert trial("print('chatter'); print(12.5)").result(30) == (12.5, "")


def test_the_last_line_of_an_error_is_the_reason() -> None:
    seconds, reason = trial("raise SystemExit('no compiler')").result(30)
    assert reason == "no compiler"
    assert seconds < 30


def test_a_hanging_one_is_stopped_with_all_it_started() -> None:
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    start = time.perf_counter()
    assert trial(code).result(1.0) == (1.0, "not compiled within 1 s")
    assert time.perf_counter() - start < 10  # its child held the pipe open: waiting for that would take a minute
