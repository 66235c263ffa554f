"""side_fusion in CUDA C++ on a GPU: M2IST's sizes, and what the emulation on a CPU cannot show."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastadapt import native
from fastadapt.prove.judge import poisoned
from tests.cuda.test_side_fusion_emulated import CALLS, call_of
from tests.kernels.side_fusion.calls import Call, composed, fused, make, results, tower
from tests.tolerance import no_worse_than

pytestmark = pytest.mark.gpu

cuda = fused("cuda")
TOWERS = {"vision": ((64, 400), 256), "text": ((64, 20), 768)}
both_towers = pytest.mark.parametrize("kind", TOWERS)


@pytest.fixture(autouse=True)
def _built() -> None:
    assert native.cuda_reason() is None, native.cuda_reason()


def m2ist(kind: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> Call:
    leading, width = TOWERS[kind]
    return make(leading, tower(kind, width, 128, 256), 2, dtype=dtype, parameter_dtype=parameter_dtype).to("cuda")


@both_towers
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=["16-bit parameters", "float32 parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_m2ist_rounds_no_more_than_eager(kind, dtype, parameter_dtype):
    call = m2ist(kind, dtype, parameter_dtype or dtype)
    with poisoned():
        ours = results(cuda, call)
    no_worse_than(ours, results(composed, call), results(composed, call.to(torch.float64)))


@pytest.mark.parametrize("name", CALLS)
def test_the_emulations_calls(name):
    call = call_of(name).to("cuda")
    with poisoned():
        ours = results(cuda, call)
    no_worse_than(ours, results(composed, call), results(composed, call.to(torch.float64)))


@both_towers
def test_the_same_bits_every_time(kind):
    call = m2ist(kind, torch.bfloat16, torch.float32)
    first = results(cuda, call)
    for _ in range(5):
        again = results(cuda, call)
        assert all(torch.equal(first[name], again[name]) for name in first)


@both_towers
def test_launches(kind):
    call = m2ist(kind, torch.bfloat16, torch.float32)
    out = cuda(call)
    wanted = [tensor for name, tensor in call.trained.items() if name not in call.bases]
    grad = torch.ones_like(out)

    def kernels(step) -> int:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        return sum("side_fusion::" in event.name for event in seen.events())

    assert kernels(lambda: cuda(call)) == 2
    assert kernels(lambda: torch.autograd.grad(out, wanted, grad)) == 4


def test_strided_and_unaligned_tensors():
    call = call_of("vision, float32 parameters").to("cuda")
    expected = results(cuda, call)
    skewed = []
    for tensor in call.tensors.values():
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].view(tensor.shape)
        skewed.append(memory.copy_(tensor.detach()).requires_grad_(tensor.requires_grad))
    found = results(cuda, call.with_tensors(skewed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
