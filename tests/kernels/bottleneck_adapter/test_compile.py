"""bottleneck_adapter under torch.compile and checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from tests.kernels.bottleneck_adapter.calls import BACKENDS, DEVICE, SEED, Call, fused, make, results
from tests.tolerance import SINGLE

every_backend = pytest.mark.parametrize("backend", BACKENDS)
ALL = {"norm": True, "scale": "rows", "residual": True}


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
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_compiled_is_eager_bit_for_bit(options, backend):
    call = make((3, 4, 16), **options, dtype=torch.float32)
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, call), results(fused(backend), call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inductor_among_other_operations():
    def layer(call: Call) -> Tensor:
        return fused()(call.with_tensors([t.sin() if name == "x" else t for name, t in call.tensors.items()])).square()

    call = make((3, 4, 16), **ALL, dtype=torch.float32)
    torch.testing.assert_close(results(torch.compile(layer, fullgraph=True), call), results(layer, call), **SINGLE)


def test_other_shapes_need_no_other_graph():
    compiled = torch.compile(fused(), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9, 0):
        call = make((rows, 16), norm=True, dtype=torch.float32)
        found, expected = results(compiled, call), results(fused(), call)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, backend):
    call = make((5, 16), **ALL, dtype=torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        return fused(backend)(call.with_tensors(tensors))

    y = checkpoint(run, *call.tensors.values(), use_reentrant=use_reentrant)
    generator = torch.Generator().manual_seed(SEED)
    y.backward(torch.randint(-8, 9, y.shape, generator=generator).to(DEVICE) / 8)
    expected = results(fused(backend), call)
    assert all(torch.equal(tensor.grad, expected[f"d {name}"]) for name, tensor in call.tensors.items())
