"""The C++ libraries: building them (`python -m fastadapt.native`) and loading them.  Importing or loading never compiles.

The kernels in csrc/ use LibTorch's stable ABI: one library serves every torch >= 2.11 and every Python.  csrc/*.cu has the same
operators for GPUs, in a library of its own that nvcc builds where there is one; it needs no CUDA to load.  csrc/*_autograd.cpp
makes operators differentiable without Python in between; autograd has no stable ABI, so that library fits the torch it was
built with, and where it is missing Python's autograd.Function does the same.  A file name carries a hash of the sources, the
compiler's arguments and, for the last, torch's version: a library built from something else is never loaded by mistake.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
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
LINKED = "-ltorch -ltorch_cpu -lc10".split()
GXX_FLAGS = "-std=c++20 -fPIC -shared -fvisibility=hidden -Wl,--no-as-needed".split()
NVCC_FLAGS = (
    "-std=c++20 -shared -O3 --threads 0 --compress-mode=size -Xcompiler -fPIC,-fvisibility=hidden -Xlinker --no-as-needed"
)
ARCHITECTURES = ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=[sm_100,compute_100]")
FLAGS = {
    "kernels": [*GXX_FLAGS, "-O3", "-fopenmp-simd", OLDEST_TORCH],
    "autograd": [*GXX_FLAGS, "-O2"],
    "cuda": [*NVCC_FLAGS.split(), *(f"-gencode=arch={target}" for target in ARCHITECTURES), OLDEST_TORCH],
}


@dataclass(frozen=True)
class Status:
    """Whether the kernels are loaded, from where, and if they are not, why; autograd, cuda: whether these libraries are too."""

    loaded: bool
    path: Path | None
    reason: str
    autograd: bool = False
    cuda: bool = False


def sources(kind: str) -> list[Path]:
    """The files that a library ("kernels", "autograd" or "cuda") is compiled from."""
    if kind == "cuda":
        return sorted(SOURCES.glob("*.cu"))
    return sorted(path for path in SOURCES.glob("*.cpp") if path.stem.endswith("_autograd") == (kind == "autograd"))


def library_name(kind: str = "kernels") -> str:
    """File name of the library that these sources give on this kind of machine."""
    fits = importlib.metadata.version("torch") if kind == "autograd" else ""
    digest = hashlib.sha256(" ".join([platform.machine(), fits, *FLAGS[kind], *LINKED]).encode())
    headers = sorted([*SOURCES.glob("*.h"), *(SOURCES.glob("*.cuh") if kind == "cuda" else ())])
    for source in [*sources(kind), *headers]:
        digest.update(source.name.encode() + source.read_bytes())
    return f"fastadapt-{kind}-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where `python -m fastadapt.native` puts the library: $FASTADAPT_CACHE, else the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTADAPT_CACHE") or Path(user_cache) / "fastadapt")


def find_nvcc() -> str | None:
    """CUDA's compiler: $NVCC (empty: none), else the one on the PATH, in $CUDA_HOME, the usual folder or pip's packages."""
    if (named := os.environ.get("NVCC")) is not None:
        return named or None
    nvidia = importlib.util.find_spec("nvidia")
    of_pip = [home for folder in (nvidia.submodule_search_locations if nvidia else ()) for home in Path(folder).glob("cu1*")]
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *of_pip]
    return next(filter(None, (shutil.which("nvcc", path=path) for path in (None, *(f"{home}/bin" for home in homes)))), None)


def build(folder: Path | None = None) -> list[Path]:
    """Compile csrc/ into `folder` (default: the cache folder) and return the libraries' paths.

    $CXX (default: g++) compiles all but the CUDA library, which is `find_nvcc`'s task and left out where there is none.
    A library appears under its name in one step, so concurrent builds and loads do not disturb each other.
    Raises RuntimeError with the compiler's message if one cannot be built; the others are there nevertheless.
    """
    torch_spec = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
    if torch_spec is None or not torch_spec.submodule_search_locations:
        raise RuntimeError("torch is not installed here: its headers are needed to build fastadapt's C++ libraries")
    torch_folder = Path(torch_spec.submodule_search_locations[0])
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in FLAGS if kind != "cuda" or find_nvcc()]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda kind: _compile(kind, folder, torch_folder), kinds))


def _compile(kind: str, folder: Path, torch_folder: Path) -> Path:
    language, variable = ("CUDA", "NVCC") if kind == "cuda" else ("C++", "CXX")
    compiler = shlex.split(find_nvcc() if kind == "cuda" else os.environ.get("CXX", "g++"))
    library = folder / library_name(kind)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / library.name
        command = [
            *compiler, *FLAGS[kind], "-isystem", str(torch_folder / "include"),
            "-isystem", str(torch_folder / "include/torch/csrc/api/include"), *map(str, sources(kind)),
            "-o", str(unfinished), f"-L{torch_folder / 'lib'}", *LINKED,
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"no {language} compiler: {compiler[0]!r} not found (set {variable} to yours)") from None
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


def cuda_reason() -> str | None:
    """Why the CUDA kernels cannot run on any GPU here; None if they can."""
    import torch

    found = status()
    if not found.loaded:
        return f"the C++ library is {found.reason}"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if found.cuda:
        return None
    if find_nvcc() is None:
        return "the CUDA kernels are not built, and there is no nvcc to build them"
    return "the CUDA kernels are not built: `python -m fastadapt.native` builds them"


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
    more = {kind: library for kind in ("autograd", "cuda") if (library := _built(kind))}
    for library in more.values():
        torch.ops.load_library(library)
    return Status(True, kernels, "", "autograd" in more, "cuda" in more)


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
