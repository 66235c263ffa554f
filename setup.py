"""Builds the C++ libraries into the package where the build finds torch and a compiler, and leaves them out elsewhere.

pip install --no-build-isolation .    with the libraries        FASTADAPT_NATIVE=1: fail rather than leave one out
pip install .                         pure Python               FASTADAPT_NATIVE=0: leave them out

The one with CUDA kernels is built where there is an nvcc (NVCC names another, or with an empty value none).
The sources travel inside the package, so `python -m fastadapt.native` can build the libraries later.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
NATIVE = os.environ.get("FASTADAPT_NATIVE", "auto")
if NATIVE not in ("auto", "0", "1"):
    sys.exit(f"FASTADAPT_NATIVE: expected auto, 0 or 1, got {NATIVE!r}")


class BuildPackage(build_py):
    """Copies the Python files, then builds the libraries beside them (into the checkout for an editable install)."""

    def run(self) -> None:
        super().run()
        folder = HERE / "fastadapt" if self.editable_mode else Path(self.build_lib) / "fastadapt"
        for earlier in folder.glob("fastadapt-*.so"):
            earlier.unlink()
        if NATIVE == "0":
            return
        sys.path.insert(0, str(HERE))
        from fastadapt import native

        try:
            native.build(folder)
        except RuntimeError as error:
            if NATIVE == "1":
                raise
            print(f"fastadapt: installing without a C++ library that could not be built: {error}", file=sys.stderr)


class Wheel(bdist_wheel):
    """Tags the wheel by what is in it: a library depends on the platform, but not on the Python (stable ABI)."""

    def get_tag(self) -> tuple[str, str, str]:
        native = any(Path(self.get_finalized_command("build_py").build_lib, "fastadapt").glob("fastadapt-*.so"))
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_") if native else "any"


setup(
    packages=[*find_packages(include=["fastadapt", "fastadapt.*"]), "fastadapt._csrc"],
    package_dir={"fastadapt._csrc": "csrc"},
    package_data={"fastadapt._csrc": ["*"], "fastadapt": ["**/*.json"]},
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
)
