"""The arrows between the parts of the package, read from the import statements; and files that fit into one's head."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "fastadapt").rglob("*.py"))
LONGEST_FILE = 400

# For each file, by the first pattern that fits, the modules of fastadapt it may import; {op} is the operation's own
# folder, and "fastadapt" alone is its public names.
INSIDE = {
    "fastadapt/__init__.py": [],
    "fastadapt/native.py": [],
    "fastadapt/core/*": ["fastadapt.core.*", "fastadapt.native"],
    "fastadapt/kernels/*/reference.py": ["fastadapt.core.philox"],
    "fastadapt/kernels/*/config.py": ["fastadapt.core.*"],
    "fastadapt/kernels/*/triton_kernel.py": ["fastadapt.core.*"],
    "fastadapt/kernels/*/triton_grad_kernel.py": ["fastadapt.core.*", "fastadapt.kernels.{op}.triton_kernel"],
    "fastadapt/kernels/*/triton_inference_kernel.py": ["fastadapt.core.*", "fastadapt.kernels.{op}.triton_kernel"],
    "fastadapt/kernels/*/triton_launch.py": [
        "fastadapt.core.*",
        "fastadapt.kernels.{op}.reference",
        "fastadapt.kernels.{op}.config",
        "fastadapt.kernels.{op}.triton_kernel",
        "fastadapt.kernels.{op}.triton_grad_kernel",
        "fastadapt.kernels.{op}.triton_inference_kernel",
    ],
    "fastadapt/kernels/*/native_kernel.py": ["fastadapt.core.philox", "fastadapt.native", "fastadapt.kernels.{op}.reference"],
    "fastadapt/kernels/*/cuda_kernel.py": ["fastadapt.core.*", "fastadapt.native", "fastadapt.kernels.{op}.*"],
    "fastadapt/kernels/frozen_group/op.py": [  # the one operation that runs another's: its linears
        "fastadapt.core.*",
        "fastadapt.kernels.{op}.reference",
        "fastadapt.kernels.{op}.config",
        "fastadapt.kernels.lora_linear.op",
    ],
    "fastadapt/kernels/*/op.py": [
        "fastadapt.core.*",
        "fastadapt.native",
        "fastadapt.kernels.{op}.reference",
        "fastadapt.kernels.{op}.config",
        "fastadapt.kernels.{op}.native_kernel",
        "fastadapt.kernels.{op}.cuda_kernel",
        "fastadapt.kernels.{op}.triton_launch",
    ],
    "fastadapt/kernels/*/cases.py": [
        "fastadapt.core.*",
        "fastadapt.kernels.{op}.op",
        "fastadapt.prove.cases",
        "fastadapt.prove.report",
    ],
    "fastadapt/kernels/*__init__.py": [],
    "fastadapt/modules/*": ["fastadapt", "fastadapt.core.*", "fastadapt.modules.*", "fastadapt.integrations.*"],
    "fastadapt/integrations/*": ["fastadapt", "fastadapt.core.*", "fastadapt.modules.*"],
    "fastadapt/prove/*": [
        "fastadapt",
        "fastadapt.core.*",
        "fastadapt.prove.*",
        "fastadapt.kernels",
        "fastadapt.kernels.*.cases",
    ],
    "fastadapt/models/__init__.py": [],
    "fastadapt/models/common/*": ["fastadapt", "fastadapt.core.*", "fastadapt.models.common.*"],
    "fastadapt/models/plan/*": [
        "fastadapt.core.*",
        "fastadapt.prove.*",
        "fastadapt.models.common.*",
        "fastadapt.models.plan.*",
    ],
    "fastadapt/models/*/*": ["fastadapt", "fastadapt.core.*", "fastadapt.models.common.*", "fastadapt.models.{op}.*"],
    "fastadapt/cli.py": ["fastadapt", "fastadapt.*"],
}

# Packages that only these files may import; everything else from outside is free.
OUTSIDE = {
    "triton": [
        "*/triton_kernel.py",
        "*/triton_grad_kernel.py",
        "*/triton_inference_kernel.py",
        "fastadapt/core/device_math.py",
        "fastadapt/core/launch.py",
        "fastadapt/core/masked_kernel.py",
        "fastadapt/prove/*",
    ],
    "peft": ["fastadapt/integrations/peft.py"],
    "transformers": ["fastadapt/models/*"],
    "safetensors": ["fastadapt/models/*"],
    "typer": ["fastadapt/cli.py", "fastadapt/models/plan/cli.py"],
    "rich": ["fastadapt/cli.py", "fastadapt/prove/*", "fastadapt/models/plan/cli.py"],
    "bench": [],
    "tests": [],
}

# Imports that must wait until a function runs: what they bring in is optional or slow.
DEFERRED = [
    ("fastadapt/kernels/*/op.py", "fastadapt.kernels.*.triton_*"),
    ("fastadapt/core/launch.py", "triton*"),
    ("fastadapt/core/philox.py", "fastadapt.core.masked_kernel"),
    ("fastadapt/modules/*", "fastadapt.integrations.*"),
    ("fastadapt/native.py", "torch*"),
    ("fastadapt/cli.py", "fastadapt.prove*"),
    ("fastadapt/models/plan/cli.py", "fastadapt.models*"),  # transformers, which is an extra
]


class Import(NamedTuple):
    module: str
    line: int
    deferred: bool


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(node: ast.AST, deferred: bool = False) -> Iterator[Import]:
    """Every import below `node`; `from package import name` counts as package.name where that is a module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            package = "." * child.level + (child.module or "")
            for alias in child.names:
                full = f"{package}.{alias.name}"
                yield Import(full if is_module(full) else package, child.lineno, deferred)
        else:
            yield from imports(child, deferred or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def violations(file: str, source: str) -> list[str]:
    """What is wrong with the imports of `source`, were it at `file` in the repository."""
    allowed = next((allowed for pattern, allowed in INSIDE.items() if fnmatch(file, pattern)), None)
    if allowed is None:
        return [f"{file}: no rule in INSIDE says what it may import"]
    op = Path(file).parent.name
    allowed = [pattern.format(op=op) for pattern in allowed]
    wrong = []
    for module, line, deferred in imports(ast.parse(source)):
        top = module.split(".")[0]
        where = f"{file}:{line}: imports {module}"
        if module.startswith("."):
            wrong.append(f"{where}, relatively")
        elif top == "fastadapt" and not any(fnmatch(module, pattern) for pattern in allowed):
            wrong.append(f"{where}, not one of {allowed}")
        elif top in OUTSIDE and not any(fnmatch(file, pattern) for pattern in OUTSIDE[top]):
            wrong.append(f"{where}, which only {OUTSIDE[top]} may")
        elif file.endswith("/reference.py") and top not in {"torch", "fastadapt", *sys.stdlib_module_names}:
            wrong.append(f"{where}, but a reference is written in torch alone")
        elif not deferred and any(fnmatch(file, a) and fnmatch(module, b) for a, b in DEFERRED):
            wrong.append(f"{where} when it is imported itself, rather than inside a function")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path):
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("fastadapt/kernels/a/op.py", "import triton", "which only"),
        ("fastadapt/kernels/a/op.py", "from fastadapt.kernels.a import triton_kernel as k", "not one of"),
        ("fastadapt/kernels/a/op.py", "from fastadapt.kernels.a.triton_launch import f", "inside a function"),
        ("fastadapt/kernels/a/op.py", "from fastadapt.kernels.b.op import f", "not one of"),
        ("fastadapt/kernels/a/reference.py", "import numpy", "torch alone"),
        ("fastadapt/kernels/a/reference.py", "from fastadapt.core import launch", "not one of"),
        ("fastadapt/core/launch.py", "import triton", "inside a function"),
        ("fastadapt/modules/a.py", "from fastadapt.kernels.lora_linear.reference import forward", "not one of"),
        ("fastadapt/modules/a.py", "def f():\n    import peft", "which only"),
        ("fastadapt/kernels/a/cases.py", "from fastadapt.prove import static", "not one of"),
        ("fastadapt/prove/a.py", "from bench import rows", "which only"),
        ("fastadapt/prove/a.py", "from fastadapt.kernels.a import config", "not one of"),
        ("fastadapt/core/a.py", "from . import launch", "relatively"),
        ("fastadapt/core/a.py", "import transformers", "which only"),
        ("fastadapt/models/a/modeling.py", "from fastadapt.models.b.modeling import c", "not one of"),
        ("fastadapt/models/a/modeling.py", "from fastadapt.modules.side import SideAdapter", "not one of"),
        ("fastadapt/models/common/a.py", "from fastadapt.models.b.modeling import c", "not one of"),
        ("fastadapt/elsewhere/a.py", "", "no rule"),
    ],
)
def test_the_rules_catch(file: str, source: str, complaint: str):
    (found,) = violations(file, source)
    assert complaint in found


@pytest.mark.parametrize("folder", ["fastadapt", "csrc", "bench", "tests"])
def test_no_file_is_too_long(folder: str):
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert files
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {file: lines for file, lines in lengths.items() if lines > LONGEST_FILE} == {}
