"""`fastadapt doctor`: what this machine has, and what runs on it.  `fastadapt verify`: whether that is right.

`fastadapt plan`: what training a method needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import fastadapt
from fastadapt import native
from fastadapt.core.backend import WHY_NOT, BackendError, choose
from fastadapt.models.plan.cli import plan

PACKAGES = ("torch", "triton", "transformers", "peft", "xformers")

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def doctor() -> None:
    """Say which versions, GPUs and C++ library are here, which backend every operation takes, and why not another."""
    _show("Versions", _versions())
    _show("GPUs", _gpus())
    _show("C++ library", _library())
    _show("Backends", _backends())
    _show("Tuned tables", _tuned())
    _show("Environment", sorted((name, value) for name, value in os.environ.items() if name.startswith("FASTADAPT_")))


@app.command()
def verify(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    arch: Annotated[list[int], typer.Option(help="Compute capability of the static table; all if none is given.")] = [],
    skip_static: Annotated[bool, typer.Option("--skip-static", help="Leave the static table out.")] = False,
) -> None:
    """Prove every kernel: right on this machine, and within its budget of machine code for every architecture."""
    if importlib.util.find_spec("triton") is None:
        console.print("triton is not installed, so there are no kernels to verify: pip install 'fastadapt[cpu]' has it")
        raise typer.Exit(1)
    # each in a process of its own: triton interprets kernels or compiles them, never both
    parts = {"correctness": ["fastadapt.prove.verify"], "static": ["fastadapt.prove.static"]}
    if arch:
        parts["static"] += ["--arch", *map(str, arch)]
    if skip_static:
        del parts["static"]
    results, failed = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for name, module in parts.items():
            file = Path(folder, f"{name}.json")
            failed |= subprocess.run([sys.executable, "-m", *module, "--json", str(file)]).returncode != 0
            results[name] = json.loads(file.read_text()) if file.exists() else None
    if json_file:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    raise typer.Exit(int(failed))


app.command()(plan)


def main() -> None:
    """The command `fastadapt`."""
    app()


def _show(title: str, lines: list[tuple[str, ...]]) -> None:
    shown = Table.grid(padding=(0, 2))
    for line in lines or [("none",)]:
        shown.add_row("", *line)
    console.print(f"[bold]{title}[/bold]")
    console.print(shown)


def _versions() -> list[tuple[str, str]]:
    own = [("python", platform.python_version()), ("fastadapt", fastadapt.__version__)]
    return own + [(package, _version(package)) for package in PACKAGES]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _gpus() -> list[tuple[str, ...]]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found.append((f"cuda:{index}", gpu.name, capability, memory, f"driver {_driver()}"))
    return found


def _driver() -> str:
    """The version of NVIDIA's driver, which brings nvidia-smi along."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: nvidia-smi is not on the PATH"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True)
    if asked.returncode != 0:
        return f"unknown: nvidia-smi failed with {asked.returncode}"
    return asked.stdout.split("\n")[0]


def _library() -> list[tuple[str, str]]:
    status = native.status()
    return [
        ("status", f"loaded from {status.path}" if status.loaded else status.reason),
        ("nvcc", native.find_nvcc() or "not found"),
        ("CUDA kernels", native.cuda_reason() or "loaded"),
    ]


def _operations() -> dict[str, Any]:
    from fastadapt.prove.cases import operations

    return operations()


def _backends() -> list[tuple[str, ...]]:
    """For each operation and kind of device, the backend of a float32 call, and what keeps the others from running."""
    return [
        (name, kind, *_backend(name, kind, cases.BACKENDS))
        for name, cases in _operations().items()
        for kind in ("cpu", "cuda")
    ]


def _backend(operation: str, kind: str, others: Sequence[str]) -> tuple[str, str]:
    if kind == "cuda" and not torch.cuda.is_available():
        return "-", "torch.cuda.is_available() is False"
    x = torch.empty(0, device=kind)
    reasons = [f"not {name}: {reason}" for name in others for reason in WHY_NOT[name](x.device, x.dtype)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would repeat the reasons
            return choose(operation, None, x, ("reference", *others)), "; ".join(reasons)
    except BackendError as error:
        return "none", str(error)


def _tuned() -> list[tuple[str, ...]]:
    """For each operation and GPU, whether its tiles were measured on such a GPU or come from the model."""
    gpus = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    configs = {name: importlib.import_module(f"fastadapt.kernels.{name}.config") for name in _operations()}
    return [
        # an operation without a table has tiles from the model alone
        (name, gpu, "tuned" if hasattr(config, "table") and config.table(gpu) else "not tuned: tiles come from a model of the GPU")
        for name, config in configs.items()
        for gpu in gpus
    ]


if __name__ == "__main__":
    main()
