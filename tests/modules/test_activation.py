"""QuickGELU: values, gradients, what it keeps, and float16's range."""

from __future__ import annotations

import pytest
import torch

from bench.memory import saved_bytes
from fastadapt.modules.activation import quick_gelu
from tests.tolerance import EXACT, no_worse_than


def plain(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def run(activation, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = activation(x)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, grad)[0]}


def test_value_and_gradient_are_the_equation():
    x, grad = torch.randn(2, 3, 5, 7, dtype=torch.float64).mul(4).unbind()
    torch.testing.assert_close(run(quick_gelu, x, grad), run(plain, x, grad), **EXACT)


def test_there_is_one_derivative_and_a_second_raises():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, x)
    (slope,) = torch.autograd.grad(quick_gelu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative .* is not implemented"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_eager(dtype):
    x, grad = torch.randn(2, 64, 64).mul(3).to(dtype).unbind()
    exact = run(plain, x.double(), grad.double())
    no_worse_than(run(quick_gelu, x, grad), run(plain, x, grad), exact)


def test_only_the_argument_is_kept():
    x = torch.randn(8, 16, requires_grad=True)
    assert saved_bytes(lambda: quick_gelu(x)) == x.nbytes
    assert saved_bytes(lambda: quick_gelu(x), exclude=[x]) == 0


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_torchs_gelu_keeps_its_argument_alone_too(approximate):
    x = torch.randn(8, 16, requires_grad=True)
    gelu = torch.nn.GELU(approximate)
    assert saved_bytes(lambda: gelu(x)) == x.nbytes
    written_out = [saved_bytes(lambda: plain(x)), saved_bytes(lambda: 0.5 * x * (1 + torch.erf(x / 2**0.5)))]
    print(f"GELU and QuickGELU keep {x.nbytes} bytes; QuickGELU and GELU written out {written_out}")
    assert min(written_out) >= 2 * x.nbytes


def test_the_argument_is_left_as_it_was():
    x = torch.randn(8, 16)
    before = x.clone()
    quick_gelu(x)
    assert torch.equal(x, before)


def test_float16_stays_finite_to_the_ends_of_its_range():
    largest = torch.finfo(torch.float16).max
    x = torch.tensor([-largest, -4e4, 0, 4e4, largest], dtype=torch.float16)
    found = run(quick_gelu, x, torch.ones_like(x))
    assert found["y"].tolist() == [0, 0, 0, x[3].item(), largest]
    assert found["dx"].tolist() == [0, 0, 0.5, 1, 1]


def test_the_dtype_stays_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert quick_gelu(torch.randn(3)).dtype is torch.float32
        assert quick_gelu(torch.randn(3, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_compiled_graph_gives_the_same():
    x, grad = torch.randn(2, 6, 9).unbind()
    compiled = torch.compile(quick_gelu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x, grad), run(quick_gelu, x, grad), rtol=0, atol=0)
