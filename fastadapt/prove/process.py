"""The process that kernels are proved in: triton decides when it is imported whether it interprets or compiles them."""

from __future__ import annotations

import os
import sys

from fastadapt.core.launch import interpreting


def rerun_unless_interpreting(wanted: bool) -> None:
    """Replace this process by the same command with TRITON_INTERPRET set to `wanted`, unless it is that already."""
    if interpreting() != wanted:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": str(int(wanted))})
