"""A command that needs the other kind of Triton starts itself anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from fastadapt.prove.process import rerun_unless_interpreting
rerun_unless_interpreting({wanted})
print(os.environ.get("TRITON_INTERPRET"), *sys.argv[1:])
"""


@pytest.mark.parametrize(("wanted", "before", "after"), [(True, "0", "1"), (False, "1", "0"), (False, "0", "0")])
def test_a_command_gets_the_triton_that_it_needs(wanted: bool, before: str, after: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(wanted=wanted), "--option", "2"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": before}, capture_output=True, text=True)
    assert run.stdout.split() == [after, "--option", "2"], run.stderr
