"""The reference in float64, against torch's own multi-head attention and against differences."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from fastadapt import light_interaction
from tests.kernels.light_interaction.calls import DEVICE, EVERYTHING, Call, composed, few_bits, fused, make, randn, results
from tests.tolerance import EXACT, no_worse_than

reference = fused("reference")


def check(call: Call, grads: list[Tensor] | None = None) -> None:
    torch.testing.assert_close(results(reference, call, grads), results(composed, call, grads), **EXACT)


SIZES = [(3, 33, 17, 16, 4), (2, 1, 1, 8, 1), (1, 50, 5, 64, 8), (2, 70, 40, 24, 3), (4, 3, 32, 6, 6)]


@pytest.mark.parametrize(("batch", "tokens", "words", "width", "heads"), SIZES)
def test_values_and_every_gradient(batch, tokens, words, width, heads):
    check(make((batch, tokens, width), words, heads))


def test_values_and_every_gradient_under_a_mask():
    check(make((4, 21, 16), 6, 4, mask=(6, 1, 3, 5)))


def test_it_is_two_modules_of_torch():
    modules = [nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    x, y = randn(2, 9, 16, dtype=torch.float64), randn(2, 5, 16, dtype=torch.float64)
    weights = zip(*((m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias) for m in modules))
    found = light_interaction(x, y, *weights, num_heads=4)
    expected = x * modules[0](x, y, y)[0], y * modules[1](y, x, x)[0]
    torch.testing.assert_close(found, expected, **EXACT)


def test_any_layout_of_inputs_and_gradients():
    tokens, words = randn(3, 12, 16, dtype=torch.float64), randn(5, 3, 16, dtype=torch.float64)
    grads = [randn(3, 16, 11, dtype=torch.float64).transpose(1, 2), randn(1, 1, 16, dtype=torch.float64).expand(3, 5, 16)]
    check(make(tokens[:, 1:], words.transpose(0, 1), 4, mask=(5, 2, 4)), grads)


@pytest.mark.parametrize("needs", [*((name,) for name in EVERYTHING), *combinations(("x", "y", "in_bias[1]"), 2)], ids="+".join)
def test_some_gradients_alone(needs):
    check(make((2, 7, 8), 3, 2, mask=(3, 1), needs=needs))


@pytest.mark.parametrize("needs", [("x", "y", *EVERYTHING[2:6]), ("x", "y", *EVERYTHING[6:])], ids=["in", "out"])
def test_derivatives_of_first_and_second_order(needs):
    call = make((2, 3, 4), 3, 2, mask=(3, 2), needs=needs)
    names = list(needs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference(call.having(**dict(zip(names, tensors)))))

    tensors = [call.tensors[name] for name in names]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_a_sample_without_a_word_attends_to_nothing():
    """Where torch gives NaN: x' is x times the output bias, and no gradient reaches what the attention would have read."""
    call = make((1, 7, 8), 3, 2, mask=(0,))
    found = results(reference, call)
    x, grad = call.tensors["x"], few_bits(call.tensors["x"])
    torch.testing.assert_close(found["x'"], x.detach() * call.tensors["out_bias[0]"].detach(), **EXACT)
    torch.testing.assert_close(found["d out_bias[0]"], (grad * x.detach()).sum((0, 1)), **EXACT)
    for name in ("in_weight[0]", "in_bias[0]", "out_weight[0]"):
        assert not found[f"d {name}"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_round_no_more_than_eager(dtype):
    call = make((2, 65, 64), 17, 8, mask=(17, 9), dtype=dtype)
    no_worse_than(results(reference, call), results(composed, call), results(composed, call.to(torch.float64)))
