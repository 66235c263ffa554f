"""side_fusion under torch.compile and checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from tests.kernels.side_fusion.calls import BACKENDS, IEA, LEA, TEXT_IEA, VEA, few_bits, fused, make, results
from tests.tolerance import SINGLE

every_backend = pytest.mark.parametrize("backend", BACKENDS)
SHARING = [LEA, replace(IEA, share="both"), replace(TEXT_IEA, own=0, shared=8, share="both")]


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


@every_backend
def test_compiled_is_eager_bit_for_bit(backend):
    call = make((3, 4), SHARING, 2, dtype=torch.float32)
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, call), results(fused(backend), call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inductor_takes_it():
    """By itself, as what Inductor makes of others around it is a matter of C++ compilers."""
    call = make((3, 4), [VEA, IEA], 1, dtype=torch.float32)
    torch.testing.assert_close(results(torch.compile(fused(), fullgraph=True), call), results(fused(), call), **SINGLE)


def test_other_shapes_need_no_other_graph():
    compiled = torch.compile(fused(), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9, 0):
        call = make((rows,), [VEA, IEA], dtype=torch.float32)
        found, expected = results(compiled, call), results(fused(), call)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, backend):
    call = make((5,), SHARING, 1, dtype=torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        return fused(backend)(call.with_tensors(tensors))

    out = checkpoint(run, *call.tensors.values(), use_reentrant=use_reentrant)
    out.backward(few_bits(out))
    expected = results(fused(backend), call)
    assert all(torch.equal(tensor.grad, expected[f"d {name}"]) for name, tensor in call.trained.items())
