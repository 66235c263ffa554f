"""The C++ libraries: building them (`python -m fastadapt.native`) and loading them.  Importing or loading never compiles.

The kernels in csrc/ use LibTorch's stable ABI: one library serves every torch >= 2.11 and every Python.  csrc/*_autograd.cpp makes
them differentiable without Python in between; autograd has no stable ABI, so that library fits the torch it was built with, and
where it is missing Python's autograd.Function does the same.  A file name carries a hash of the sources, the compiler's arguments
and, for the second, torch's version: a library built from something else is never loaded by mistake.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
# an installed package carries the sources inside it, a checkout beside it
SOURCES = next(folder for folder in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if folder.is_dir())
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
COMMON_FLAGS = "-std=c++20 -fPIC -shared -fvisibility=hidden".split()
LINKED = "-Wl,--no-as-needed -ltorch -ltorch_cpu -lc10".split()
FLAGS = {"kernels": ["-O3", "-fopenmp-simd", OLDEST_TORCH], "autograd": ["-O2"]}


@dataclass(frozen=True)
class Status:
    """Whether the kernels are loaded, from where, and if they are not, why; autograd: whether its library is loaded too."""

    loaded: bool
    path: Path | None
    reason: str
    autograd: bool = False


def sources(kind: str) -> list[Path]:
    """The files that a library ("kernels" or "autograd") is compiled from."""
    return sorted(path for path in SOURCES.glob("*.cpp") if path.stem.endswith("_autograd") == (kind == "autograd"))


def library_name(kind: str = "kernels") -> str:
    """File name of the library that these sources give on this kind of machine."""
    fits = importlib.metadata.version("torch") if kind == "autograd" else ""
    digest = hashlib.sha256(" ".join([platform.machine(), fits, *COMMON_FLAGS, *FLAGS[kind], *LINKED]).encode())
    for source in [*sources(kind), *sorted(SOURCES.glob("*.h"))]:
        digest.update(source.name.encode() + source.read_bytes())
    return f"fastadapt-{kind}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where `python -m fastadapt.native` puts the library: $FASTADAPT_CACHE, else the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTADAPT_CACHE") or Path(user_cache) / "fastadapt")


def build(folder: Path | None = None) -> list[Path]:
    """Compile csrc/ into `folder` (default: the cache folder) with $CXX (default: g++) and return the libraries' paths.

    A library appears under its name in one step, so concurrent builds and loads do not disturb each other.
    Raises RuntimeError with the compiler's message if one cannot be built.
    """
    torch_spec = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
    if torch_spec is None or not torch_spec.submodule_search_locations:
        raise RuntimeError("torch is not installed here: its headers are needed to build fastadapt's C++ libraries")
    torch_folder = Path(torch_spec.submodule_search_locations[0])
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda kind: _compile(kind, folder, torch_folder), FLAGS))


def _compile(kind: str, folder: Path, torch_folder: Path) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    library = folder / library_name(kind)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / library.name
        command = [
            *compiler, *COMMON_FLAGS, *FLAGS[kind], "-isystem", str(torch_folder / "include"),
            "-isystem", str(torch_folder / "include/torch/csrc/api/include"), *map(str, sources(kind)),
            "-o", str(unfinished), f"-L{torch_folder / 'lib'}", *LINKED,
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"no C++ compiler: {compiler[0]!r} not found (set CXX to yours)") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{error.stderr[-4000:]}") from None
        os.replace(unfinished, library)
    return library


_status: Status | None = None
_lock = threading.Lock()


def load() -> bool:
    """Whether torch.ops.fastadapt_native is there; the first call loads the library if it has been built."""
    return status().loaded


def status() -> Status:
    """What `load` found."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _find_and_load()
    return _status


def differentiable() -> bool:
    """Whether the kernels are differentiable without Python's autograd.Function."""
    return status().autograd


def _find_and_load() -> Status:
    import torch

    kernels = _built("kernels")
    if kernels is None:
        return Status(False, None, "not built: `python -m fastadapt.native` builds it with a C++ compiler")
    try:
        torch.ops.load_library(kernels)
    except OSError as error:
        return Status(False, kernels, f"built, but this torch ({torch.__version__}) cannot load it: {error}")
    _register_fakes()
    autograd = _built("autograd")
    if autograd is not None:
        torch.ops.load_library(autograd)
    return Status(True, kernels, "", autograd is not None)


def _built(kind: str) -> Path | None:
    name = library_name(kind)
    return next((path for path in (PACKAGE / name, cache_folder() / name) if path.exists()), None)


def _register_fakes() -> None:
    import torch

    @torch.library.register_fake("fastadapt_native::masked")
    def _masked(x: torch.Tensor, seed: torch.Tensor, threshold: int, member: int) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("fastadapt_native::keep_mask")
    def _keep_mask(seed: torch.Tensor, rows: int, cols: int, threshold: int, member: int) -> torch.Tensor:
        return seed.new_empty((rows, cols), dtype=torch.bool)


if __name__ == "__main__":
    print(*build(), sep="\n")
