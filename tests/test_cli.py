"""`fastadapt doctor` and `fastadapt verify`: what they tell, and what they start."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from fastadapt import cli, native
from fastadapt.core.backend import BackendError
from fastadapt.prove.cases import operations


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA T", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpu.name)


def lines(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_doctor_without_a_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTADAPT_STRICT", "1")
    monkeypatch.setattr(cli, "PACKAGES", ("torch", "no-such-package"))
    result = call("doctor")
    assert result.exit_code == 0, result.output
    told = lines(result.output)
    assert ["torch", torch.__version__] in told
    assert ["no-such-package", "missing"] in told
    assert ["GPUs"] in told and told[told.index(["GPUs"]) + 1] == ["none"]
    assert ["lora_linear", "cuda", "-", "torch.cuda.is_available()", "is", "False"] in told
    for name, cases in operations().items():
        (line,) = (line for line in told if line[:2] == [name, "cpu"])
        assert line[2] in ("reference", *cases.BACKENDS)
    assert ["FASTADAPT_STRICT", "1"] in told


def test_doctor_tells_why_there_is_no_library(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda: native.Status(False, None, "not built: a reason"))
    assert ["status", "not", "built:", "a", "reason"] in lines(call("doctor").output)


@pytest.mark.parametrize(
    ("nvcc", "reason", "told"),
    [
        ("/bin/nvcc", None, [("nvcc", "/bin/nvcc"), ("CUDA kernels", "loaded")]),
        (None, "a reason", [("nvcc", "not found"), ("CUDA kernels", "a reason")]),
    ],
)
def test_cuda_kernels(monkeypatch: pytest.MonkeyPatch, nvcc: str | None, reason: str | None, told: list) -> None:
    monkeypatch.setattr(native, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(native, "cuda_reason", lambda: reason)
    assert cli._library()[1:] == told


def test_gpus_are_listed_with_their_driver(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_driver", lambda: "580.1")
    assert cli._gpus() == [
        (f"cuda:{index}", "NVIDIA T", "compute capability 9.0", "80 GiB", "driver 580.1") for index in range(2)
    ]


@pytest.mark.parametrize(
    ("found", "answer", "driver"),
    [
        (None, None, "unknown: nvidia-smi is not on the PATH"),
        ("/bin/nvidia-smi", (0, "580.1\n580.1\n"), "580.1"),
        ("/bin/nvidia-smi", (9, ""), "unknown: nvidia-smi failed with 9"),
    ],
)
def test_driver(monkeypatch: pytest.MonkeyPatch, found: str | None, answer: tuple | None, driver: str) -> None:
    monkeypatch.setattr(cli.shutil, "which", lambda name: found)
    monkeypatch.setattr(cli.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=answer[0], stdout=answer[1]))
    assert cli._driver() == driver


def test_tuned_tables_are_told_by_gpu(two_gpus: None) -> None:
    untuned = "NVIDIA T", "not tuned: tiles come from a model of the GPU"
    assert cli._tuned() == [(name, *untuned) for name in operations()]


def test_every_reason_against_a_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = {"fast": lambda device, dtype: [], "faster": lambda device, dtype: ["too hot", f"too {device}"]}
    monkeypatch.setattr(cli, "WHY_NOT", why_not)
    monkeypatch.setattr(cli, "choose", lambda operation, requested, x, backends: "fast")
    assert cli._backend("lora_linear", "cpu", ["faster"]) == ("fast", "not faster: too hot; not faster: too cpu")


def test_a_call_that_strict_mode_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(operation: str, requested: str | None, x: torch.Tensor, backends: Sequence[str]) -> str:
        raise BackendError(f"{operation}: refused")

    monkeypatch.setattr(cli, "WHY_NOT", {"faster": lambda device, dtype: []})
    monkeypatch.setattr(cli, "choose", refuse)
    assert cli._backend("lora_linear", "cpu", ["faster"]) == ("none", "lora_linear: refused")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of processes that prove: what they would have been told; the static table breaks a budget on 89."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        python, m, module, *options, json_option, file = command
        assert (python, m, json_option) == (sys.executable, "-m", "--json")
        commands.append([module, *options])
        Path(file).write_text(json.dumps([module]))
        return SimpleNamespace(returncode=int("89" in command))

    monkeypatch.setattr(cli.subprocess, "run", run)
    return commands


def test_verify_proves_both(started: list[list[str]], tmp_path: Path) -> None:
    result = call("verify", "--json", str(tmp_path / "all.json"))
    assert (result.exit_code, started) == (0, [["fastadapt.prove.verify"], ["fastadapt.prove.static"]])
    assert json.loads((tmp_path / "all.json").read_text()) == {
        "correctness": ["fastadapt.prove.verify"],
        "static": ["fastadapt.prove.static"],
    }


def test_verify_fails_where_one_part_does(started: list[list[str]]) -> None:
    assert call("verify", "--arch", "80", "--arch", "89").exit_code == 1
    assert started[1] == ["fastadapt.prove.static", "--arch", "80", "89"]


def test_verify_without_the_static_table(started: list[list[str]]) -> None:
    assert call("verify", "--skip-static").exit_code == 0
    assert started == [["fastadapt.prove.verify"]]


def test_a_part_that_crashes_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.subprocess, "run", lambda command: SimpleNamespace(returncode=-11))
    assert call("verify", "--json", str(tmp_path / "all.json")).exit_code == 1
    assert json.loads((tmp_path / "all.json").read_text()) == {"correctness": None, "static": None}


def test_verify_without_triton(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = call("verify")
    assert result.exit_code == 1 and "triton is not installed" in result.output and started == []


def test_the_entry_point_runs() -> None:
    run = subprocess.run([sys.executable, "-m", "fastadapt.cli", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "doctor" in run.stdout and "verify" in run.stdout


def test_importing_it_loads_nothing_that_is_slow() -> None:
    program = "import sys, fastadapt.cli; print([m for m in ('triton', 'peft', 'fastadapt.prove') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
