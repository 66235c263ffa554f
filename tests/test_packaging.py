"""Wheels with and without the C++ library, and what importing the package costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from fastadapt import native

ROOT = Path(__file__).parent.parent
SHIPPED = ("setup.py", "pyproject.toml", "README.md", "fastadapt", "csrc")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from: building leaves files behind."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def pip_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "..", ".", cwd=source, **environment)


def only_wheel(source: Path) -> Path:
    (wheel,) = source.parent.glob("*.whl")
    return wheel


def test_pure_wheel_carries_every_file_and_the_sources_of_the_library(source: Path):
    built = pip_wheel(source, FASTADAPT_NATIVE="0")
    assert built.returncode == 0, built.stderr
    assert only_wheel(source).name == "fastadapt-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(only_wheel(source)) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = Parser().parsestr(wheel.read("fastadapt-0.1.0.dist-info/METADATA").decode())
    in_package = {path for suffix in ("py", "json") for path in (source / "fastadapt").rglob(f"*.{suffix}")}
    expected = {path.relative_to(source).as_posix() for path in in_package}
    assert files == expected | {f"fastadapt/_csrc/{path.name}" for path in (source / "csrc").iterdir()}
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["numpy", "rich", "torch>=2.11", "typer"]


def test_native_wheel_is_bound_to_no_python_and_loads(source: Path, tmp_path: Path):
    built = pip_wheel(source, FASTADAPT_NATIVE="1", NVCC="")  # tests/cuda looks at the library that nvcc makes
    assert built.returncode == 0, built.stderr
    assert "-py3-none-linux_" in only_wheel(source).name
    site = tmp_path / "site"
    with zipfile.ZipFile(only_wheel(source)) as wheel:
        wheel.extractall(site)
    script = "from fastadapt import native; print(native.status().path, native.SOURCES)"
    run = python("-c", script, cwd=tmp_path, PYTHONPATH=str(site), FASTADAPT_CACHE=str(tmp_path / "empty"))
    package = site / "fastadapt"
    assert run.stdout.split() == [str(package / native.library_name()), str(package / "_csrc")], run.stderr


def test_without_a_compiler_the_wheel_is_pure(source: Path):
    built = pip_wheel(source, FASTADAPT_NATIVE="auto", CXX="no-such-compiler", NVCC="")
    assert built.returncode == 0, built.stderr
    assert only_wheel(source).name.endswith("-py3-none-any.whl")


def test_without_a_compiler_a_demanded_library_is_an_error(source: Path):
    built = pip_wheel(source, FASTADAPT_NATIVE="1", CXX="no-such-compiler", NVCC="")
    assert built.returncode != 0
    assert "'no-such-compiler' not found" in built.stdout + built.stderr


def test_a_misspelt_choice_is_an_error(source: Path):
    built = pip_wheel(source, FASTADAPT_NATIVE="yes")
    assert built.returncode != 0
    assert "FASTADAPT_NATIVE: expected auto, 0 or 1, got 'yes'" in built.stdout + built.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastadapt", ["triton", "peft", "transformers", "fastadapt.native", "fastadapt.kernels"]),
        ("import fastadapt.native", ["torch"]),  # setup.py imports it where there may be no torch
        ("from fastadapt import lora_linear", ["triton", "peft", "transformers"]),
        ("from fastadapt import fuse, LoraLinear", ["triton", "peft", "transformers"]),
    ],
)
def test_importing_loads_only_what_is_used(statement: str, absent: list[str]):
    run = python("-c", f"{statement}\nimport sys\nprint([m for m in {absent} if m in sys.modules])", cwd=ROOT)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
