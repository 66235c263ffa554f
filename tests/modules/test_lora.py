"""LoraLinear and PhiloxDropout: values, gradients, parameters and errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastadapt import LoraLinear, PhiloxDropout
from fastadapt.core import philox
from tests.tolerance import EXACT

K, N, R = 12, 7, 3


def make(dtype: torch.dtype = torch.float64, **lora) -> LoraLinear:
    """A layer whose update is not zero."""
    torch.manual_seed(0)
    layer = LoraLinear(K, N, r=R, lora_alpha=6, dtype=dtype, **lora)
    nn.init.normal_(layer.lora_B)
    return layer


def plain(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_output_and_gradients_are_the_equation(bias, use_rslora):
    layer = make(bias=bias, use_rslora=use_rslora)
    assert layer.scaling == (6 / math.sqrt(R) if use_rslora else 2.0)
    x = torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.lora_A, layer.lora_B]
    got, expected = layer(x), plain(layer, x)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(got, wanted, grad), torch.autograd.grad(expected, wanted, grad), **EXACT
    )


def test_only_the_adapter_trains_and_the_start_is_the_linear():
    linear = nn.Linear(K, N)
    layer = LoraLinear.from_linear(linear, r=R, lora_alpha=6)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(4, K)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(K) and layer.lora_A.std() > 0


def test_from_linear_keeps_the_parameter_objects():
    linear = nn.Linear(K, N, dtype=torch.bfloat16).eval()
    layer = LoraLinear.from_linear(linear, r=R)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_linear_checkpoint_loads():
    linear, layer = nn.Linear(K, N), LoraLinear(K, N, r=R)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert missing == ["lora_A", "lora_B"] and unexpected == []
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    layer = make(dtype).eval()
    weight, x, eps = layer.weight.clone(), torch.randn(4, K, dtype=dtype), torch.finfo(dtype).eps
    unmerged = layer(x)
    layer.merge()
    merged = layer.weight.clone()
    layer.merge()
    assert layer.merged and torch.equal(layer.weight, merged)
    update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(merged.double(), weight.double() + update, rtol=eps, atol=1e-7)
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=16 * eps * unmerged.abs().max().item())
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=2 * eps * merged.abs().max().item())


def test_dropout_only_while_training_and_equal_to_the_eager_twin():
    layer, dropout = make(lora_dropout=0.3), PhiloxDropout(0.3)
    x = torch.randn(6, K, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    expected = F.linear(x, layer.weight, layer.bias) + layer.scaling * dropout(x) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(got, expected, **EXACT)
    grads = [torch.autograd.grad(y.square().sum(), [x, layer.lora_A, layer.lora_B]) for y in (got, expected)]
    torch.testing.assert_close(*grads, **EXACT)
    torch.testing.assert_close(layer.eval()(x), plain(layer, x), **EXACT)


def test_deepcopy_and_state_dict_round_trip():
    layer = make()
    twin, x = copy.deepcopy(layer), torch.randn(3, K, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x)) and twin.lora_A is not layer.lora_A
    fresh = LoraLinear(K, N, r=R, lora_alpha=6, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_representation_names_the_adapter():
    assert "r=3, lora_alpha=6, lora_dropout=0.0, use_rslora=False" in repr(make())
    assert repr(PhiloxDropout(0.25)) == "PhiloxDropout(p=0.25)"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LoraLinear(K, N, r=0), "r: expected .* got 0"),
        (lambda: LoraLinear(K, N, lora_dropout=1.0), "lora_dropout: expected .* got 1.0"),
        (lambda: LoraLinear.from_linear(nn.Conv1d(1, 1, 1)), "linear: expected a torch.nn.Linear, got Conv1d"),
        (lambda: PhiloxDropout(-0.1), "p: expected .* got -0.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def seeded(dropout: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return dropout(x)


def test_dropout_is_the_mask_of_its_seed():
    p, x = 0.4, torch.randn(3, 5, 9)
    torch.manual_seed(3)
    mask = philox.keep_mask(philox.draw_seed(x.device), 15, 9, p).view(3, 5, 9)
    assert torch.equal(seeded(PhiloxDropout(p), x), x * mask * philox.inv_keep(p))


def test_dropout_gradients_and_what_it_saves():
    dropout, x = PhiloxDropout(0.4), torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: seeded(dropout, x), x)
    assert torch.autograd.gradgradcheck(lambda x: seeded(dropout, x), x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int64, (1,))]


def test_dropout_under_compile_and_checkpointing_is_the_same():
    dropout, x = PhiloxDropout(0.4), torch.randn(6, 9, requires_grad=True)
    expected = seeded(dropout, x)
    assert torch.equal(seeded(torch.compile(dropout, fullgraph=True, backend="aot_eager"), x), expected)
    torch.manual_seed(3)
    recomputed = torch.utils.checkpoint.checkpoint(lambda x: dropout(x).square(), x, use_reentrant=False)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (expected.square(), recomputed)]
    assert torch.equal(*grads)


def test_dropout_is_the_identity_in_eval_and_at_zero():
    x, state = torch.randn(2, 3), torch.get_rng_state()
    for dropout in (PhiloxDropout(0.4).eval(), PhiloxDropout(0.0), PhiloxDropout(1e-6)):  # 1e-6 is below the resolution
        assert dropout(x) is x and torch.equal(torch.get_rng_state(), state)
