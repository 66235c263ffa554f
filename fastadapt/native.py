"""The C++ library: building it (`python -m fastadapt.native`) and loading it.  Importing or loading never compiles.

The sources in csrc/ use LibTorch's stable ABI: one library serves every torch >= 2.11 and every Python.  Its file name
carries a hash of the sources and the compiler's arguments: one built from other sources is never loaded by mistake.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
# an installed package carries the sources inside it, a checkout beside it
SOURCES = next(folder for folder in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if folder.is_dir())
OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
FLAGS = [*"-std=c++20 -O3 -fPIC -shared -fvisibility=hidden -fopenmp-simd".split(), OLDEST_TORCH]
LIBRARIES = "-Wl,--no-as-needed -ltorch -ltorch_cpu -lc10".split()


@dataclass(frozen=True)
class Status:
    """Whether the library is loaded, from where, and if it is not, why."""

    loaded: bool
    path: Path | None
    reason: str


def library_name() -> str:
    """File name of the library these sources give on this kind of machine."""
    digest = hashlib.sha256(" ".join([platform.machine(), *FLAGS, *LIBRARIES]).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return f"fastadapt-{digest.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where `python -m fastadapt.native` puts the library: $FASTADAPT_CACHE, else the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTADAPT_CACHE") or Path(user_cache) / "fastadapt")


def build(folder: Path | None = None) -> Path:
    """Compile csrc/ into `folder` (default: the cache folder) with $CXX (default: g++) and return the library's path.

    The library appears under its name in one step, so concurrent builds and loads do not disturb each other.
    Raises RuntimeError with the compiler's message if it cannot be built.
    """
    torch_spec = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
    if torch_spec is None or not torch_spec.submodule_search_locations:
        raise RuntimeError("torch is not installed here: its headers are needed to build fastadapt's C++ library")
    torch_folder = Path(torch_spec.submodule_search_locations[0])
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / library_name()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / library.name
        command = [
            *compiler, *FLAGS, "-isystem", str(torch_folder / "include"), *map(str, sorted(SOURCES.glob("*.cpp"))),
            "-o", str(unfinished), f"-L{torch_folder / 'lib'}", *LIBRARIES,
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


def _find_and_load() -> Status:
    import torch

    built = [path for path in (PACKAGE / library_name(), cache_folder() / library_name()) if path.exists()]
    if not built:
        return Status(False, None, "not built: `python -m fastadapt.native` builds it with a C++ compiler")
    try:
        torch.ops.load_library(built[0])
    except OSError as error:
        return Status(False, built[0], f"built, but this torch ({torch.__version__}) cannot load it: {error}")
    _register_fakes()
    return Status(True, built[0], "")


def _register_fakes() -> None:
    import torch

    @torch.library.register_fake("fastadapt_native::masked")
    def _masked(x: torch.Tensor, seed: torch.Tensor, threshold: int, member: int) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("fastadapt_native::keep_mask")
    def _keep_mask(seed: torch.Tensor, rows: int, cols: int, threshold: int, member: int) -> torch.Tensor:
        return seed.new_empty((rows, cols), dtype=torch.bool)


if __name__ == "__main__":
    print(build())
