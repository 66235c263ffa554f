"""side_fusion's CUDA kernels, compiled for the CPU: right values, no races, nothing out of bounds.

Each checker is shown to find a fault: the same kernels run past a barrier, or with less memory than they were launched for.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cuda import emulation
from tests.kernels.side_fusion.calls import Call, Spec, composed, make, results
from tests.tolerance import no_worse_than

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run where there is a GPU")

CHECKERS = {"plain": (), "races": ("-fsanitize=thread",), "bounds": ("-fsanitize=address",)}
VISION_EXPERT = Spec(depth=40, hidden=24, own=48, norm=True, scale=0.1)
VISION = [Spec(depth=40, hidden=24, own=0, shared=48), VISION_EXPERT]
TEXT_EXPERT = Spec(depth=72, hidden=16, own=264, norm=True, scale=0.1, out_norm=True, out_norm_eps=1e-12)
TEXT = [Spec(depth=72, hidden=16, own=200, shared=64, out_norm=True, out_norm_eps=1e-12), TEXT_EXPERT]
PLAIN = Spec(depth=24, hidden=16, own=32)
NORMS_ALONE = replace(PLAIN, biases=False, norm=True, norm_bias=False, out_norm=True, out_bias=False, activation="quick_gelu")

# name -> rows, adapters, bases (how many, or their dtypes), taps' dtype, parameters' dtype
CALLS: dict[str, tuple] = {
    "vision, float32 parameters": (70, VISION, 2, torch.bfloat16, torch.float32),
    "text, 16-bit parameters": (37, TEXT, 2, torch.float16, torch.float16),
    "one row, a float32 base": (1, [PLAIN], [torch.float32, torch.bfloat16], torch.bfloat16, torch.float32),
    "two splits of rows": (130, [VISION_EXPERT], 0, torch.float16, torch.float32),
    "hidden layers of 128 and 5, taps of unequal width": (
        33,
        [Spec(depth=264, hidden=128, own=8, activation="gelu"), Spec(depth=8, own=3, shared=5, activation="identity")],
        1,
        torch.bfloat16,
        torch.bfloat16,
    ),
    "scales that 16 bits do not hold, and none": (
        20,
        [replace(PLAIN, scale=1e6), replace(PLAIN, scale=0.0), replace(PLAIN, scale=1e-6), replace(PLAIN, scale=-1e6)],
        [torch.float32],
        torch.float16,
        torch.float32,
    ),
    "norms without biases": (20, [NORMS_ALONE], 0, torch.float16, torch.float32),
    "a norm of the result between adapters without": (
        33,
        [PLAIN, replace(PLAIN, out_norm=True), replace(PLAIN, activation="gelu"), PLAIN],
        1,
        torch.bfloat16,
        torch.float32,
    ),
    "no rows": (0, VISION, 1, torch.float16, torch.float32),
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The emulated kernels under a checker, compiled when first asked for, by one of the processes that test."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def compiled(checker: str) -> Path:
        path = shared / f"side_fusion-{checker}"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            subprocess.run([*emulation.compiler(*CHECKERS[checker]), str(unfinished)], check=True)
            unfinished.replace(path)
        return path

    return compiled


def call_of(name: str) -> Call:
    rows, specs, bases, dtype, parameter_dtype = CALLS[name]
    return make((rows,), specs, bases, dtype=dtype, parameter_dtype=parameter_dtype)


def trained(values: dict) -> dict:
    """Without the bases' gradients, which are dout itself and no kernel's."""
    return {name: value for name, value in values.items() if not name.startswith("d base")}


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_round_no_more_than_eager(name: str, program: Callable, tmp_path: Path) -> None:
    call = call_of(name)
    ours = emulation.run(program("plain"), call, tmp_path)
    no_worse_than(ours, trained(results(composed, call)), trained(results(composed, call.to(torch.float64))))


def test_gradients_that_nobody_wants(program: Callable, tmp_path: Path) -> None:
    call = call_of("vision, float32 parameters")
    every = emulation.run(program("plain"), call, tmp_path)
    wanted = ("0 shared_weight", "1 norm_bias", "1 down_bias")
    some = emulation.run(program("plain"), call.requiring(*wanted), tmp_path)
    assert set(some) == {"out", *(f"d {name}" for name in wanted)}
    assert all(torch.equal(some[name], every[name]) for name in some)


def test_shared_projections_get_the_sum(program: Callable, tmp_path: Path) -> None:
    adapter = Spec(depth=24, hidden=24, own=0, share="S", shared=32, activation="gelu")
    call = make((40,), [adapter] * 2, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    ours = emulation.run(program("plain"), call, tmp_path)
    no_worse_than(ours, results(composed, call), results(composed, call.to(torch.float64)))


CHECKED = ["vision, float32 parameters", "text, 16-bit parameters"]


def short(name: str) -> Call:
    """One tile of rows and a part of another; more would show nothing new."""
    _, specs, bases, dtype, parameter_dtype = CALLS[name]
    return make((34 if specs is TEXT else 66,), specs[1:], bases, dtype=dtype, parameter_dtype=parameter_dtype)


@pytest.mark.parametrize("checker", ["races", "bounds"])
@pytest.mark.parametrize("name", CHECKED)
def test_checkers_find_nothing(name: str, checker: str, program: Callable, tmp_path: Path) -> None:
    emulation.run(program(checker), short(name), tmp_path)


@pytest.mark.parametrize(
    ("checker", "environment", "report"),
    [
        ("races", {"EMULATED_SKIP_BARRIER": "2", "TSAN_OPTIONS": "halt_on_error=1"}, "ThreadSanitizer: data race"),
        ("bounds", {"EMULATED_LESS_SHARED": "64"}, "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_checkers_find_a_fault(checker: str, environment: dict, report: str, program: Callable, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        emulation.run(program(checker), short(CHECKED[0]), tmp_path, **environment)
    assert report in failure.value.stderr and "side_fusion_" in failure.value.stderr
