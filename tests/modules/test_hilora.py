"""HiLoraLinear: its pairs and stages, by itself and inside a frozen block, and that its held weight follows every change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import FrozenBlock, HiLoraLinear
from tests.tolerance import EXACT

WIDTH, RANK = 6, 2


def make(first: tuple[int, ...] = (0, 1, 2), stage: int = 1, dropout: float = 0.0) -> HiLoraLinear:
    """In use and frozen the pairs before the one of this stage, which trains, and those after it not in use."""
    kind = {"first": first, "r": RANK, "lora_alpha": 3.0, "lora_dropout": dropout}
    linear = HiLoraLinear.from_linear(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), **kind).eval()
    linear.requires_grad_(False).stage = stage
    for pair in linear.pairs.values():
        nn.init.normal_(pair.lora_B)
    if str(stage) in linear.pairs:
        linear.pairs[str(stage)].requires_grad_(True).train()
    return linear


def equation(linear: HiLoraLinear, x: Tensor) -> Tensor:
    y = x @ linear.weight.T + linear.bias
    for first, pair in linear.pairs.items():
        if int(first) <= linear.stage:
            y = y + 3.0 / RANK * x @ pair.lora_A.T @ pair.lora_B.T
    return y


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_it_is_its_equation(stage):
    linear, x = make(stage=stage), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, WIDTH, dtype=torch.float64)
    inputs = [x, *(p for p in linear.parameters() if p.requires_grad)]
    assert len(inputs) == 3
    ours, expected = (torch.autograd.grad(f(x), inputs, grad) for f in (linear, lambda x: equation(linear, x)))
    torch.testing.assert_close(linear(x), equation(linear, x), **EXACT)
    torch.testing.assert_close(ours, expected, **EXACT)


def block(linears: list[nn.Module]) -> FrozenBlock:
    norms = [nn.LayerNorm(WIDTH, dtype=torch.float64).requires_grad_(False) for _ in range(2)]
    q, k, v, out, fc1, fc2 = linears
    return FrozenBlock(norms[0], q, k, v, out, norms[1], fc1, fc2, heads=2, activation="quick_gelu").eval()


@pytest.mark.parametrize("first, stage", [((0, 1, 2), 1), ((0,), 0), ((0, 1), 0)])
def test_a_frozen_block_runs_it(first, stage):
    linears = [make(first, stage) for _ in range(6)]
    if first == (0, 1):  # two that train, as one
        for linear in linears:
            linear.stage = 1
            linear.pairs.requires_grad_(True)
    fused, x = block(linears), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    trained = [p for linear in linears for p in linear.parameters() if p.requires_grad]
    assert len(trained) == (24 if first == (0, 1) else 12)

    def composed() -> Tensor:
        q, k, v, out, fc1, fc2 = (lambda x, linear=linear: equation(linear, x) for linear in linears)
        n = fused.norm1(x)
        heads = (f(n).unflatten(-1, (2, -1)).transpose(1, 2) for f in (q, k, v))
        s = x + out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        h = fc1(fused.norm2(s))
        return s + fc2(h * torch.sigmoid(1.702 * h))

    y, expected = fused(x), composed()
    torch.testing.assert_close(y, expected, **EXACT)
    grads = (torch.autograd.grad((f * f).sum(), trained) for f in (y, expected))
    torch.testing.assert_close(*map(list, grads), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, **EXACT)
    assert all(isinstance(member := linear.member(x), tuple) and member.lora_a is not None for linear in linears)
    with torch.no_grad():
        assert all(linear.member(x).lora_a is None for linear in linears)


def test_the_held_weight_follows_every_change():
    linear, x = make(stage=2), torch.randn(3, WIDTH, dtype=torch.float64)
    held = linear.member(x).weight
    assert linear.member(x).weight is held and held is not linear.weight and not held.requires_grad
    changes = [
        lambda: nn.init.normal_(linear.pairs["0"].lora_A),
        lambda: setattr(linear, "weight", nn.Parameter(linear.weight * 2, requires_grad=False)),
        lambda: setattr(linear, "stage", 1),
        lambda: linear.load_state_dict({name: tensor + 1 for name, tensor in linear.state_dict().items()}),
        lambda: linear.pairs.requires_grad_(False),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(linear(x), equation(linear, x), **EXACT)
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        twin.pairs["0"].lora_B.add_(1)
    torch.testing.assert_close(twin(x), equation(twin, x), **EXACT)
    torch.testing.assert_close(linear(x), equation(linear, x), **EXACT)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), equation(linear, x), **EXACT)


def test_merging_keeps_the_function():
    linear, x = make(), torch.randn(3, WIDTH, dtype=torch.float64)
    before, weight, unused = linear(x), linear.weight.clone(), linear.pairs["2"].lora_B.clone()
    linear.merge()
    torch.testing.assert_close(linear(x), before, **EXACT)
    assert not torch.equal(linear.weight, weight) and torch.equal(linear.pairs["2"].lora_B, unused)
    assert not any(pair.lora_B.any() for pair in linear.used) and len(linear.used) == 2
    assert linear.pairs["1"].lora_B.requires_grad and not linear.weight.requires_grad


def test_a_new_pair_changes_nothing():
    linear = nn.Linear(WIDTH, WIDTH)
    adapted, x = HiLoraLinear.from_linear(linear, r=RANK), torch.randn(2, WIDTH)
    assert adapted.weight is linear.weight and adapted.bias is linear.bias
    assert torch.equal(adapted(x), linear(x)) and adapted.pairs["0"].lora_A.any()
    assert list(adapted.state_dict()) == ["weight", "bias", "pairs.0.lora_A", "pairs.0.lora_B"]


def test_only_what_trains_drops():
    linear = make(dropout=0.5)
    x = torch.ones(2000, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y = linear(x)
        fixed = copy.deepcopy(linear)
        fixed.pairs["1"].eval()
        torch.testing.assert_close(y.mean(0), fixed(x)[0], rtol=0.2, atol=0.3)
        assert y.std(0).min() > 0.1
        linear.pairs["1"].lora_B.zero_()
        assert torch.equal(linear(x)[0], linear(x)[1])


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda linear: linear.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda linear: linear.weight.requires_grad_(True), "trains"),
        (lambda linear: linear.pairs.requires_grad_(True), "some of its pairs drop elements and others do not"),
    ],
)
def test_what_a_block_cannot_read_is_said(change, reason):
    linear = make(dropout=0.5)
    change(linear)
    assert linear.member(torch.randn(1, 1, WIDTH, dtype=torch.float64)) == reason


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"first": (1, 0)}, "first: expected ascending stages, got"),
        ({"r": 0}, "r: expected a rank of at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiLoraLinear(WIDTH, WIDTH, **arguments)
    with pytest.raises(ValueError, match="linear: expected a torch.nn.Linear, got Identity"):
        HiLoraLinear.from_linear(nn.Identity())
