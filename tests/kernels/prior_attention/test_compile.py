"""torch.compile and checkpointing, alone and together: what eager mode computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from tests.kernels.prior_attention.calls import BACKENDS, DEVICE, Call, Function, few_bits, fused, make, results
from tests.tolerance import SINGLE

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module", autouse=True)
def _fresh_cache() -> Iterator[None]:
    """No graph of an earlier version of the operation: its code is not part of the key under which graphs are kept."""
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """A compiler without graphs, and kernels for float32, of which exact float32 has none."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_float32_matmul_precision(before)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_is_eager_bit_for_bit(masked, backend):
    call = make(masked=masked, dtype=torch.float32)
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, call), results(fused(backend), call))


def test_other_shapes_need_no_other_graph():
    compiled = torch.compile(fused("triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        call = make(queries=rows, keys=rows + 1, masked=True, dtype=torch.float32)
        assert_same(results(compiled, call), results(fused("triton"), call))


def test_inductor_among_other_operations():
    def layer(call: Call) -> Tensor:
        return fused()(replace(call, q=torch.nn.functional.gelu(call.q))).square()

    call = make(masked=True, dtype=torch.float32)
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
    call = make(masked=True, dtype=torch.float32)
    expected = results(fused(backend), call)
    out = checkpointed(fused(backend), use_reentrant)(call)
    out.backward(few_bits(out))
    assert_same({"out": out.detach()} | {f"d {name}": tensor.grad for name, tensor in call.tensors.items()}, expected)


def test_compiled_checkpoint_under_autocast():
    call = make(masked=True, dtype=torch.float32)

    def function(call: Call) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return checkpointed(fused("triton"), use_reentrant=False)(call)

    found = results(torch.compile(function, fullgraph=True, backend="aot_eager"), call)
    assert_same(found, results(function, call))
