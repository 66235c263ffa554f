"""The CUDA library as it was built: its machine code for each architecture, and that any torch loads it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from fastadapt import native

triton = pytest.importorskip("triton", reason="triton brings the disassembler")
pytestmark = pytest.mark.skipif(native.find_nvcc() is None, reason="there is no nvcc to build the CUDA kernels")

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
DTYPES = ("Half", "Bfloat")
# kernel -> registers at the most: what lets the blocks that it is meant for share a multiprocessor
REGISTERS = {
    "pack_kernel<{}>": 64,
    "forward_kernel<{}, 1>": 255,
    "forward_kernel<{}, 2>": 128,
    "hidden_grad_kernel<{}, 1>": 255,
    "hidden_grad_kernel<{}, 2>": 128,
    "product_kernel<{}>": 128,
    "finish_kernel<{}>": 64,
}
KERNELS = {kernel.format(dtype): most for kernel, most in REGISTERS.items() for dtype in DTYPES}


def library() -> Path:
    found = native._built("cuda")
    assert found is not None, "nvcc is here, and yet the CUDA library was not built"
    return found


def disassembler(*arguments: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments, str(library())]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plain(names: str) -> str:
    """C++ names as they are written, without the namespace."""
    readable = subprocess.run(["c++filt"], input=names, check=True, capture_output=True, text=True).stdout
    return readable.replace("fastadapt::side_fusion::", "").replace("fastadapt::", "")


@lru_cache(maxsize=1)
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> what it uses: REG, STACK, LOCAL, ..."""
    found: dict[str, dict] = defaultdict(dict)
    for line in plain(disassembler("-res-usage")).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function void (.*)\(", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch][kernel] = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", line)}
    return found


@lru_cache(maxsize=1)
def instructions(arch: str) -> dict[str, Counter]:
    """Kernel -> its instructions, counted."""
    found: dict[str, Counter] = defaultdict(Counter)
    for line in plain(disassembler("-sass", "-arch", arch)).splitlines():
        if match := re.match(r"\s*Function : void (.*)\(", line):
            kernel = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            found[kernel][match[1]] += 1
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_and_registers_stay_within_budget(arch: str) -> None:
    used = resources()[arch]
    assert set(used) == set(KERNELS)
    for kernel, most in KERNELS.items():
        assert (used[kernel]["STACK"], used[kernel]["LOCAL"]) == (0, 0), f"{kernel} spills: {used[kernel]}"
        assert used[kernel]["REG"] <= most, f"{kernel}: {used[kernel]['REG']} registers, {most} allowed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_run_on_tensor_cores_from_wide_copies(dtype: str) -> None:
    counted = instructions("sm_90a")
    mma = "HMMA.16816.F32.BF16" if dtype == "Bfloat" else "HMMA.16816.F32"
    for kernel in ("forward_kernel<{}, 1>", "forward_kernel<{}, 2>", "hidden_grad_kernel<{}, 2>", "product_kernel<{}>"):
        found = counted[kernel.format(dtype)]
        assert found[mma] >= 16 and found["LDGSTS.E.BYPASS.128"] >= 2, (kernel, found)
        assert sum(count for name, count in found.items() if name.startswith("LDSM.16.M")) >= 4, (kernel, found)
        assert not any(name.startswith("LDGSTS") and not name.endswith("128") for name in found), (kernel, found)


def test_code_for_later_gpus_is_there() -> None:
    assert "sm_100" in disassembler("--list-ptx")


def test_it_is_loaded_whether_or_not_torch_has_cuda() -> None:
    assert native.status().cuda
    for name in ("side_fusion", "side_fusion_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastadapt_native::{name}", "CUDA")


def test_the_operators_take_the_arguments_of_their_schema() -> None:
    """Sent to the CUDA kernels by hand: the message, of a list that is too long, comes from behind the conversion of them all."""
    assert native.status().cuda
    kernels = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    tensors = [torch.randn(3, 8), torch.randn(8, 8), *[None] * 9]
    options = 0, [1, 1], [1.0], [1e-5], [1e-5]
    operators = torch.ops.fastadapt_native
    for operator, lists in (
        (operators.side_fusion, (tensors,)),
        (operators.side_fusion_backward, (tensors, [torch.randn(3, 8)], [False] * 11)),
    ):
        with pytest.raises(RuntimeError, match="lists of 1 adapters and 0 bases expected"):
            operator.default.redispatch(kernels, *lists, *options)
