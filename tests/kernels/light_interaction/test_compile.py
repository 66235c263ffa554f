"""torch.compile and checkpointing: the same numbers, to the bit where nothing else is compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from tests.kernels.light_interaction.calls import BACKENDS, Call, fused, make, results
from tests.tolerance import SINGLE

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of another test, nor of an earlier version of the operation."""
    torch.compiler.reset()
    with fresh_cache():
        yield
    torch.compiler.reset()


def small() -> Call:
    return make((2, 9, 16), 3, 4, mask=(3, 1), dtype=torch.float32)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@every_backend
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_is_eager_bit_for_bit(compiler, backend):
    call = small()
    compiled = torch.compile(fused(backend), fullgraph=True, backend=compiler)
    assert_same(results(compiled, call), results(fused(backend), call))


def test_inductor_among_other_operations():
    def layer(call: Call) -> list[Tensor]:
        return [output.square() for output in fused()(call.having(x=torch.nn.functional.gelu(call.tensors["x"])))]

    call = small()
    found = results(torch.compile(layer, fullgraph=True), call)
    torch.testing.assert_close(found, results(layer, call), **SINGLE)


def test_other_shapes_need_no_other_graph():
    compiled = torch.compile(fused("triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9):
        call = make((2, tokens, 16), 3, 4, dtype=torch.float32)
        assert_same(results(compiled, call), results(fused("triton"), call))


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(backend, use_reentrant):
    call = small()
    names = list(call.tensors)

    def checkpointed(call: Call) -> tuple[Tensor, ...]:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return fused(backend)(call.having(**dict(zip(names, tensors))))

        return checkpoint(run, *call.tensors.values(), use_reentrant=use_reentrant)

    expected = results(fused(backend), call)
    outputs = checkpointed(call)
    grads = [torch.ones_like(output) for output in outputs]
    if not use_reentrant:
        assert_same(results(checkpointed, call), expected)
        return
    torch.autograd.backward(outputs, grads)
    found = {f"d {name}": tensor.grad for name, tensor in call.tensors.items()}
    plain = results(fused(backend), call, grads)
    assert_same(found, {name: plain[name] for name in found})
