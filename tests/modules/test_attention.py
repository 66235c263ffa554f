"""MultiheadAttention against torch's own, which forms the attention weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastadapt.modules.attention import MultiheadAttention
from tests.tolerance import EXACT, no_worse_than

B, T, S, E, H = 2, 5, 7, 12, 3

# which of query, key and value are one tensor object
SAME = {"all": (0, 0, 0), "query and key": (0, 0, 1), "key and value": (0, 1, 1), "none": (0, 1, 2)}


def pair(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same parameters, none of them zero."""
    ours = MultiheadAttention(E, H, dropout, dtype=dtype)
    theirs = nn.MultiheadAttention(E, H, dropout, batch_first=True, dtype=dtype)
    for parameter in (ours.in_proj_bias, ours.out_proj.bias):
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def padding() -> torch.Tensor:
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 4:] = mask[1, 0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("same", SAME)
def test_output_and_gradients_are_torchs(same, masked):
    ours, theirs = pair()
    given = [torch.randn(B, S, E, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs, mask = [given[i] for i in SAME[same]], padding() if masked else None
    got, expected = ours(*inputs, mask), theirs(*inputs, key_padding_mask=mask, need_weights=True)[0]
    torch.testing.assert_close(got, expected, **EXACT)
    grad, used = torch.randn_like(expected), given[: max(SAME[same]) + 1]
    got = torch.autograd.grad(got, [*used, *ours.parameters()], grad)
    expected = torch.autograd.grad(expected, [*used, *theirs.parameters()], grad)
    torch.testing.assert_close(got, expected, **EXACT)


def test_queries_may_differ_in_number_from_keys():
    ours, theirs = pair()
    query, key, value = (torch.randn(B, n, E, dtype=torch.float64) for n in (T, S, S))
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0], **EXACT)


def test_a_padded_key_changes_nothing():
    ours, _ = pair()
    query, key = torch.randn(B, T, E, dtype=torch.float64), torch.randn(B, S, E, dtype=torch.float64)
    changed = torch.where(padding()[..., None], 100.0, key)
    torch.testing.assert_close(ours(query, changed, changed, padding()), ours(query, key, key, padding()), **EXACT)
    assert not torch.allclose(ours(query, changed, changed), ours(query, key, key))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_query_with_no_key_left_gives_the_bias(dtype):
    ours, _ = pair(dtype)
    x = torch.randn(B, S, E, dtype=dtype, requires_grad=True)
    mask = padding()
    mask[1] = True
    y = ours(x, x, x, mask)
    assert torch.equal(y[1], ours.out_proj.bias.expand(S, E))
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(x.grad[1], torch.zeros(S, E, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_torchs(dtype):
    x = torch.randn(B, S, E, dtype=dtype)
    results = []
    for kind in (dtype, torch.float64):
        torch.manual_seed(1)
        modules = [module.to(kind) for module in pair(dtype)]
        for module in modules:
            leaf = x.to(kind).requires_grad_()
            y = module(leaf, leaf, leaf)
            y = y if isinstance(y, torch.Tensor) else y[0]
            grads = torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])
            results.append({"y": y.detach()} | {f"grad {i}": grad for i, grad in enumerate(grads)})
    ours, eager, _, exact = results
    no_worse_than(ours, eager, exact)


def test_parameters_are_drawn_like_torchs():
    torch.manual_seed(5)
    ours = MultiheadAttention(E, H).state_dict()
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(E, H).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dropout_drops_weights_while_training_only():
    ours, theirs = pair(dropout=0.5)
    x = torch.randn(B, S, E, dtype=torch.float64)
    assert not torch.allclose(ours(x, x, x), ours(x, x, x))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, x, x), theirs(x, x, x)[0], **EXACT)


def test_dropout_keeps_the_mean():
    ours, _ = pair(dropout=0.25)
    x = torch.randn(1, S, E, dtype=torch.float64)
    drawn = torch.stack([ours(x, x, x) for _ in range(2000)])
    standard_error = drawn.std(0) / len(drawn) ** 0.5
    ours.eval()
    assert ((drawn.mean(0) - ours(x, x, x)).abs() < 5 * standard_error).all()


def test_compiles_whole_and_runs_on_meta():
    ours, _ = pair()
    x = torch.randn(B, S, E, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, padding()), ours(x, x, x, padding()), **EXACT)
    assert ours.to("meta")(x.to("meta"), x.to("meta"), x.to("meta")).shape == x.shape


def test_without_dropout_no_weights_are_kept_for_the_backward():
    ours, _ = pair()
    x = torch.randn(1, 64, E, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(x, x, x)
    assert kept and max(kept) < H * 64 * 64


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MultiheadAttention(10, 3), "num_heads: expected a divisor of embed_dim = 10, got 3"),
        (lambda: MultiheadAttention(10, 0), "num_heads: expected .* got 0"),
        (lambda: MultiheadAttention(E, H, 1.0), "dropout: expected .* got 1.0"),
        (
            lambda: MultiheadAttention(E, H)(*[torch.zeros(B, S, E)] * 3, torch.zeros(B, S)),
            "key_padding_mask: expected None or a bool tensor, .* got torch.float32",
        ),
        (
            lambda: MultiheadAttention(E, H)(*[torch.zeros(B, S, E)] * 3, torch.zeros(B, T, dtype=torch.bool)),
            r"key_padding_mask: expected shape \(2, 7\), got shape \(2, 5\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_representation_names_the_sizes():
    assert "MultiheadAttention(\n  embed_dim=12, num_heads=3, dropout=0.0" in repr(MultiheadAttention(E, H))
