"""Machine code without a GPU: compile recorded launches for any architecture in ARCHS and read what came out.

Triton's package carries the assembler and the disassembler; all it lacks on a CPU machine is a driver to say which GPU
to compile for.  The argument specialisation (alignment of pointers, divisibility of integers) is Triton's own, so what
is read here is what a launch with such tensors would run.  Kernels must compile in this process: TRITON_INTERPRET=0.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastadapt.core.launch import Launch
from fastadapt.prove.report import ARCHS, Report


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile one recorded launch for compute capability `arch` (80, 89, 90, 100 or 120) and read its machine code."""
    return compile_launches([(launch, arch)])[0]


def compile_launches(
    pairs: Iterable[tuple[Launch, int]], progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> list[Report]:
    """Compile (launch, arch) pairs, one a core, and read their machine code; equal ones are compiled and read once.

    Args:
        pairs: launches as `fastadapt.core.launch.recording` collects them, each with one of the architectures in ARCHS;
            their tensors may be on the meta device, where `data_ptr` still tells the alignment of a view.
        progress: wraps the sequence of kernels that is gone through as they are compiled, as rich.progress.track does.

    Returns:
        One Report per pair, in order.

    Raises:
        ValueError: for an unknown architecture.
        RuntimeError: if kernels are interpreted in this process.
        triton.CompilationError: if a kernel does not compile.
    """
    # ignore_errors: the first failed compilation raises from result() below, and leaves no half-closed mode behind
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        pending = [_start(launch, arch) for launch, arch in pairs]
        kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in progress(pending)]
    unread = {kernel.hash: kernel for kernel in kernels if kernel.hash not in _reports}
    _reports.update(zip(unread, _read(list(unread.values()))))
    return [_reports[kernel.hash] for kernel in kernels]


# Triton's hash of a compiled kernel (source, signature, constants, options, architecture) -> what was read from it.
# Triton itself keeps the compiled kernel of every specialisation, so an equal launch is not compiled again either.
_reports: dict[str, Report] = {}


class _Driver:
    """As much of a GPU driver as compiling asks for; the architecture stands in for the device index, a cache key."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _pretending(arch: int) -> Iterator[None]:
    real = driver._active  # not `.active`: that would look for a GPU
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver.set_active(real)


def _start(launch: Launch, arch: int) -> Any:
    """The compiled kernel, or a future of it."""
    if arch not in ARCHS:
        raise ValueError(f"arch: expected one of {sorted(ARCHS)}, got {arch!r}")
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError(
            f"launch: {launch.kernel.__name__} cannot be compiled where kernels are interpreted; "
            "run this process with TRITON_INTERPRET=0"
        )
    with _pretending(arch):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)


def _read(kernels: Sequence[Any]) -> list[Report]:
    by_arch = defaultdict(list)
    for kernel in kernels:
        by_arch[kernel.metadata.target.arch].append(_text(kernel.asm["cubin"]))
    mixes = {arch: iter(_instructions(texts, arch)) for arch, texts in by_arch.items()}
    return [_report(kernel, next(mixes[kernel.metadata.target.arch])) for kernel in kernels]


def _report(kernel: Any, mix: Counter[str]) -> Report:
    metadata = kernel.metadata
    usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", contents=kernel.asm["cubin"])
    resources = re.search(rf"Function {metadata.name}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    regs, stack, local = map(int, resources.groups())
    return Report(
        kernel=metadata.name,
        arch=metadata.target.arch,
        num_warps=metadata.num_warps,
        regs=regs,
        stack=stack,
        local=local,
        shared=metadata.shared,
        tensor_memory=metadata.tmem_size,
        mix=mix,
    )


def _text(elf: bytes) -> bytes:
    """The instructions of a cubin's only kernel: its section .text.NAME."""
    table = struct.unpack_from("<Q", elf, 0x28)[0]
    entry_size, entries, names_entry = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(entries)]
    names = headers[names_entry][4]
    return next(
        elf[start : start + size] for name, *_, start, size in headers if elf[names + name :].startswith(b".text.")
    )


def _instructions(texts: Sequence[bytes], arch: int) -> list[Counter[str]]:
    """The mnemonics of every text, counted.

    The texts are disassembled as one: starting the disassembler costs more than a whole kernel.
    """
    variant = f"SM{arch}" + ("a" if arch >= 90 else "")
    code = _run(triton.knobs.nvidia.nvdisasm.path, "--binary", variant, contents=b"".join(texts))
    owners = (i for i, text in enumerate(texts) for _ in range(len(text) // _INSTRUCTION_BYTES))
    mixes: list[Counter[str]] = [Counter() for _ in texts]
    for owner, mnemonic in zip(owners, _INSTRUCTION.findall(code), strict=True):
        mixes[owner][mnemonic] += 1
    return mixes


# "        /*01a0*/              @!P0 LDG.E.128 R4, [R2.64] ;" -> LDG.E.128
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_INSTRUCTION_BYTES = 16


def _run(tool: str, *options: str, contents: bytes) -> str:
    """What a command-line tool prints about a file with these contents."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(contents)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    from fastadapt.prove import table

    table.main()
