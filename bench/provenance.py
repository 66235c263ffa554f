"""Where a row's numbers come from: everything they depend on that the row itself does not say."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastadapt import native

ROOT = Path(__file__).parents[1]
KERNEL_SOURCES = ("fastadapt/kernels", "fastadapt/core", "csrc")
KERNEL_SUFFIXES = {".py", ".json", ".h", ".cpp", ".cu"}
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "TRITON_INTERPRET", "CHECKPOINT")
ENVIRONMENT_PREFIXES = ("FASTADAPT_", "TORCHINDUCTOR_", "PYTORCH_", "NVIDIA_TF32")


def collect(device: torch.device, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """A flat dictionary: versions, device, switches, hashes of the configuration and of the kernels' sources, seed."""
    return {
        "git": _git(),
        "kernel_sources": _digest_of_sources(),
        "config": _digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "seed": seed,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "native": "loaded" if native.load() else "absent",
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in ENVIRONMENT or name.startswith(ENVIRONMENT_PREFIXES)
        },
    }


def processor() -> str:
    """The CPU's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": processor(), "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "uuid": _digest(str(properties.uuid).encode()),  # tells two cards apart without naming either
        "arch": f"sm_{properties.major}{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _git() -> str:
    """The commit, with '+' where the tree differs from it; 'unknown' outside a repository."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _digest_of_sources() -> str:
    files = sorted(
        path for folder in KERNEL_SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in KERNEL_SUFFIXES
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
