"""torch.compile as a baseline: never a silent return to eager, and tried first in a process that can be stopped.

Compiled code lands in Inductor's cache, so that this process then compiles the same in seconds.
`python -m bench.compiled CASE DEVICE` is that process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

CACHE = "TORCHINDUCTOR_CACHE_DIR"
_STRICT = {"fullgraph": True, "dynamic": False}


def compile_in_place(modules: Iterable[nn.Module]) -> None:
    """Compile modules for the shapes they meet, each as one graph; what cannot be raises when it is called."""
    _forget()
    for module in modules:
        module.compile(**_STRICT)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for the shapes it meets, as one graph; what cannot be raises when it is called."""
    _forget()
    return torch.compile(function, **_STRICT)


def _forget() -> None:
    """Drop what was compiled before: its shapes would make these ones symbolic, and it counts towards the limit on
    recompilations.
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass
class Trial:
    """A compilation of a case's compiled arm, in progress."""

    process: subprocess.Popen[str]
    started: float = field(default_factory=time.perf_counter)

    def result(self, budget: float) -> tuple[float, str]:
        """(seconds that compiling took, "") or, after at most `budget` seconds, (those spent, why it cannot run)."""
        try:
            output, errors = self.process.communicate(timeout=max(0.0, budget - (time.perf_counter() - self.started)))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # the compilers it started belong to its group
            self.process.communicate()
            return budget, f"not compiled within {budget:.0f} s"
        if self.process.returncode:
            return time.perf_counter() - self.started, (errors.strip().splitlines() or ["no message"])[-1]
        return float(output.splitlines()[-1]), ""


def start(case: str, device: str, cache: Path) -> Trial:
    """Start compiling the named case's compiled arm into `cache`, which this process will then read too."""
    os.environ[CACHE] = str(cache)
    command = [sys.executable, "-m", "bench.compiled", case, device]
    return Trial(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    )


def main(name: str, device: str) -> None:
    """Build the case's compiled arm, check it, run each phase once, and print the seconds that took beyond building."""
    from bench.case import COMPILED
    from bench.cases import find

    case = find(name)
    inputs = case.make_inputs(torch.device(device))
    start = time.perf_counter()
    arm = case.arms[COMPILED](inputs)
    arm.outputs(False)
    for phase in case.work:
        arm.step(phase)(0)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
