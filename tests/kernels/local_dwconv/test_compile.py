"""torch.compile and checkpointing, alone and together: what eager mode computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from tests.kernels.local_dwconv.calls import BACKENDS, DEVICE, Call, Function, few_bits, fused, make, results
from tests.tolerance import SINGLE

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache() -> Iterator[None]:
    """No graph of an earlier version of the operation: its code is not part of the key under which graphs are kept."""
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(dtype: torch.dtype = torch.float32) -> Call:
    return make(2, (2, 3), dtype=dtype)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@every_backend
def test_compiled_is_eager_bit_for_bit(backend):
    call = small()
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, call), results(fused(backend), call))


def test_other_batches_need_no_other_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused("triton"), fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3):
        call = make(batch, (2, 3), dtype=torch.float32)
        assert_same(results(compiled, call), results(fused("triton"), call))
    assert counter.frame_count == 1


@pytest.mark.parametrize("adjacent", [False, True], ids=["", "adjacent channels"])
def test_inductor_among_other_operations(adjacent):
    def layer(call: Call) -> Tensor:
        weight = call.weight.permute(2, 0, 1) if adjacent else call.weight
        return fused()(replace(call, x=torch.nn.functional.gelu(call.x), weight=weight)).square()

    call = small()
    if adjacent:
        call = replace(call, weight=call.weight.detach().permute(1, 2, 0).contiguous().requires_grad_())
    found = results(torch.compile(layer, fullgraph=True), call)
    torch.testing.assert_close(found, results(layer, call), **SINGLE)


def checkpointed(function: Function, use_reentrant: bool) -> Function:
    """The function, run again in the backward in place of what it would have kept."""

    def run(call: Call) -> Tensor:
        return checkpoint(
            lambda *tensors: function(call.with_tensors(*tensors)), *call.tensors.values(), use_reentrant=use_reentrant
        )

    return run


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, backend):
    call = small()
    expected = results(fused(backend), call)
    y = checkpointed(fused(backend), use_reentrant)(call)
    y.backward(few_bits(y))
    assert_same({"y": y.detach()} | {f"d {name}": tensor.grad for name, tensor in call.tensors.items()}, expected)


def test_compiled_checkpoint_under_autocast():
    call = small()

    def function(call: Call) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return checkpointed(fused("triton"), use_reentrant=False)(call)

    found = results(torch.compile(function, fullgraph=True, backend="aot_eager"), call)
    assert_same(found, results(function, call))
