"""Which calls the CUDA kernels of side_fusion take, told by dtypes and sizes alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fastadapt import native
from fastadapt.kernels.side_fusion import cuda_kernel
from fastadapt.kernels.side_fusion.reference import Operands
from tests.kernels.side_fusion.calls import Call, Spec, make, tower

GOOD = Spec(depth=16, hidden=8, own=24)


def reasons(call: Call) -> list[str]:
    tensors = [call.tensors[name] for name in call.bases]
    for i in range(len(call.adapters)):
        tensors += [call.adapter(i).get(name) for name in Operands._fields]
    return cuda_kernel.why_not(tensors, len(call.bases))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "width"), [("vision", 256), ("text", 768)])
def test_m2ists_towers_are_taken(kind, width, dtype, parameter_dtype):
    assert reasons(make((2, 3), tower(kind, width, 128, 256), 2, dtype=dtype, parameter_dtype=parameter_dtype)) == []


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (make((2,), GOOD, dtype=torch.float32), "taps are torch.float32"),
        (make((2,), GOOD, dtype=torch.float16, parameter_dtype=torch.float64), "neither torch.float16 nor float32"),
        (make((2,), [GOOD] * 17, dtype=torch.float16), "17 adapters, kernels take at most 16"),
        (make((2,), GOOD, 5, dtype=torch.float16), "5 bases, kernels take at most 4"),
        (make((2,), Spec(depth=16, hidden=8, own=0), dtype=torch.float16), "no up-projection"),
        (make((2,), replace(GOOD, depth=20), dtype=torch.float16), "a tap is 20 wide, kernels take multiples of 8 up to 768"),
        (make((2,), replace(GOOD, own=776), dtype=torch.float16), "a result is 776 wide"),
        (make((2,), replace(GOOD, hidden=129), dtype=torch.float16), "a hidden layer is 129 wide, kernels take at most 128"),
    ],
)
def test_each_limit_is_told(call, told):
    (reason,) = reasons(call)
    assert told in reason


def test_limits_are_the_kernels():
    code = (native.SOURCES / "side_fusion_device.cuh").read_text()
    for name, here in {
        "kMaxAdapters": cuda_kernel.MAX_ADAPTERS,
        "kMaxBases": cuda_kernel.MAX_BASES,
        "kMaxWidth": cuda_kernel.MAX_WIDTH,
        "kHidden": cuda_kernel.MAX_HIDDEN,
    }.items():
        assert re.search(rf"\b{name} = (\d+)", code)[1] == str(here)
