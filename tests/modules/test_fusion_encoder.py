"""FusionEncoder against torch's own modules, with attention maps, masks that are stored and all that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastadapt import FusionEncoder
from fastadapt.core import philox
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT, no_worse_than

B, T, D, H, FFN = 3, 7, 16, 4, 24


def make(dtype: torch.dtype = torch.float64, layers: int = 2, dropout: float = 0.0, **options) -> FusionEncoder:
    return randomise(FusionEncoder(D, H, layers, FFN, dropout, **options)).to(dtype)


def given(dtype: torch.dtype = torch.float64, batched: bool = False) -> list[Tensor]:
    shapes = (B, T, D), (B, T, D) if batched else (T, D)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def padding() -> Tensor:
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 4:] = mask[1, 0] = True
    return mask


class Long(nn.Module):
    """The encoder from nn.MultiheadAttention, its weights asked for, and functions; dropout masks from the same seeds."""

    def __init__(self, encoder: FusionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, rows: int | None = None) -> Tensor:
        encoder = self.encoder
        for layer in encoder.layers[:-1]:
            x = self.layer(layer, x, positions, mask, None)
        x = self.layer(encoder.layers[-1], x, positions, mask, rows)
        return encoder.norm(x) if encoder.pre_norm else x

    def layer(self, layer: nn.Module, x: Tensor, positions: Tensor, mask: Tensor | None, rows: int | None) -> Tensor:
        pre, p = self.encoder.pre_norm, self.encoder.dropout if self.encoder.training else 0.0
        seed = philox.draw_seed(x.device) if p else None
        a = layer.norm1(x) if pre else x
        attended = self.attention(layer.self_attn, (a + positions)[:, :rows], a + positions, a, mask, p)
        s = x[:, :rows] + dropped(attended, p, seed, 0)
        n = layer.norm2(s) if pre else layer.norm1(s)
        u = dropped(layer.linear1(n).relu(), p, seed, 1)
        t = (s if pre else n) + dropped(layer.linear2(u), p, seed, 2)
        return t if pre else layer.norm2(t)

    def attention(self, own: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
        if p == 0:
            attention = nn.MultiheadAttention(D, H, batch_first=True, dtype=v.dtype)
            return torch.func.functional_call(attention, dict(own.named_parameters()), (q, k, v, mask))[0]
        projections = zip((q, k, v), own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3))
        q, k, v = (F.linear(*each).unflatten(-1, (H, -1)).transpose(1, 2) for each in projections)
        scores = q @ k.mT / (D // H) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        kept = dropped(scores.softmax(-1), p, philox.draw_seed(v.device), 0)
        return own.out_proj((kept @ v).transpose(1, 2).flatten(2))


def dropped(x: Tensor, p: float, seed: Tensor | None, member: int) -> Tensor:
    if seed is None:
        return x
    keep = philox.keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p, member).view(x.shape)
    return x * keep * philox.inv_keep(p)


def both(encoder: FusionEncoder, inputs: list[Tensor], *arguments, seed: int = 3) -> list[dict[str, Tensor]]:
    """Values and gradients, ours and the long form's, from one state of the generator."""
    results = []
    for call in (encoder, Long(encoder)):
        torch.manual_seed(seed)
        y = call(*inputs, *arguments)
        results.append(with_gradients(y, encoder, x=inputs[0], positions=inputs[1]))
    return results


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("masked", "rows", "batched"), [(False, None, False), (True, None, True), (True, 2, False)])
def test_output_and_gradients_are_the_long_forms(pre_norm, recompute, dropout, masked, rows, batched):
    encoder = make(dropout=dropout, pre_norm=pre_norm, recompute=recompute)
    torch.testing.assert_close(*both(encoder, given(batched=batched), padding() if masked else None, rows), **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_floating_mask_is_added_to_the_scores(recompute):
    encoder = make(recompute=recompute)
    torch.testing.assert_close(*both(encoder, given(), torch.randn(B, T, dtype=torch.float64)), **EXACT)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_state_dicts_are_those_of_torchs_encoder(pre_norm):
    ours = make(pre_norm=pre_norm).eval()
    layer = nn.TransformerEncoderLayer(D, H, FFN, batch_first=True, norm_first=pre_norm, dtype=torch.float64)
    norm = nn.LayerNorm(D, dtype=torch.float64) if pre_norm else None
    theirs = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).eval()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x, torch.zeros(T, D).double()), theirs(x), **EXACT)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sample_with_every_token_masked_attends_to_nothing(recompute, dtype):
    encoder = make(dtype, layers=1, pre_norm=True, recompute=recompute)
    mask = padding()
    mask[1] = True
    inputs = given(dtype)
    with_gradients(y := encoder(*inputs, mask), encoder, x=inputs[0])
    without = make(dtype, layers=1, pre_norm=True)
    without.load_state_dict(encoder.state_dict())
    without.layers[0].self_attn.out_proj.weight.data.zero_()
    torch.testing.assert_close(y[1], without(*inputs)[1], rtol=0, atol=1e-10 if dtype is torch.float64 else 0.05)
    grads = torch.autograd.grad(encoder(*inputs, mask)[1].sum(), [*inputs, *encoder.parameters()])
    assert all(grad.isfinite().all() for grad in grads) and not grads[1].any()


def test_a_masked_token_changes_nothing_elsewhere():
    encoder, (x, positions) = make(), given()
    changed, mask = torch.where(padding()[..., None], 100.0, x), padding()
    others = ~mask
    torch.testing.assert_close(encoder(changed, positions, mask)[others], encoder(x, positions, mask)[others], **EXACT)
    assert not torch.allclose(encoder(changed, positions)[others], encoder(x, positions)[others])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_copies_state_dict_compile_and_autocast(pre_norm, recompute):
    encoder, inputs = make(layers=1, pre_norm=pre_norm, recompute=recompute), given()

    def run(module: nn.Module, inputs: list[Tensor]) -> Tensor:
        return module(*inputs, padding())

    round_trips(encoder, inputs, run)
    compiles(encoder, inputs, run)
    runs_under_autocast(encoder, [x.detach() for x in inputs], run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_low_precision_is_no_worse_than_eager(pre_norm, dtype):
    """Over several draws of the weights as they start, among which luck evens out."""
    draws = []
    for _ in range(16):
        encoder, inputs = FusionEncoder(D, H, 1, FFN, 0.0, pre_norm=pre_norm).to(dtype), given(dtype)
        wide = make(layers=1, pre_norm=pre_norm)
        wide.load_state_dict(encoder.state_dict())
        exact = both(wide, [x.detach().double().requires_grad_() for x in inputs], padding())[1]
        draws.append((*both(encoder, inputs, padding()), exact))
    no_worse_than(*({name: torch.cat([one[name].flatten() for one in arm]) for name in arm[0]} for arm in zip(*draws)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_it_draws_the_same_masks(use_reentrant, recompute):
    encoder, inputs = make(layers=1, dropout=0.3, recompute=recompute), given()
    results = []
    for run in (encoder, lambda *args: checkpoint(encoder, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = run(*inputs)
        leaves = [*inputs, *encoder.parameters()]
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    torch.testing.assert_close(*results, **EXACT)


def test_dropout_drops_while_training_only():
    encoder, (x, positions) = make(dropout=0.25), given()
    assert not torch.allclose(encoder(x, positions), encoder(x, positions))
    encoder.eval()
    assert torch.equal(encoder(x, positions), encoder(x, positions))
    torch.testing.assert_close(encoder(x, positions), Long(encoder)(x, positions), **EXACT)


def test_frozen_parameters_have_no_gradient_and_the_others_the_same():
    encoder, inputs = make(layers=1), given()
    every = with_gradients(encoder(*inputs), encoder, x=inputs[0])
    encoder.layers[0].linear1.requires_grad_(False), encoder.layers[0].norm2.requires_grad_(False)
    encoder.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 12 - 5
    y = encoder(*inputs)
    grad = torch.linspace(-3, 3, y.numel(), dtype=torch.float64).view(y.shape).cos()
    found = torch.autograd.grad(y, [inputs[0], *trained.values()], grad)
    torch.testing.assert_close(dict(zip(["x", *trained], found)), {name: every[name] for name in ("x", *trained)}, **EXACT)


def test_there_is_one_derivative_and_an_empty_batch():
    encoder, (x, positions) = make(layers=1), given()
    with pytest.raises(RuntimeError, match="derivative of its backward is not implemented"):
        torch.autograd.grad(encoder(x, positions).sum(), x, create_graph=True)
    encoder(x[:0], positions).sum().backward()
    assert not positions.grad.any()


def call(change: Callable[[dict], object]) -> Callable[[], object]:
    def run() -> object:
        arguments = {"tokens": torch.zeros(B, T, D), "positions": torch.zeros(T, D)}
        change(arguments)
        return FusionEncoder(D, H, 1, FFN)(**arguments)

    return run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: FusionEncoder(D, H, 0), "num_layers: expected at least 1, got 0"),
        (lambda: FusionEncoder(D, 3), "num_heads: expected a divisor of embed_dim = 16, got 3"),
        (lambda: FusionEncoder(D, H, dropout=1.0), "dropout: expected a number p"),
        (call(lambda a: a.update(tokens=torch.zeros(B, T, 8))), r"tokens: expected shape \(any, any, 16\)"),
        (call(lambda a: a.update(tokens=torch.zeros(B, T, D).double())), "tokens: expected torch.float32, got torch.float64"),
        (call(lambda a: a.update(positions=torch.zeros(6, D))), r"positions: expected shape \(7, 16\)"),
        (call(lambda a: a.update(positions=torch.zeros(1, T, D))), r"positions: expected shape \(3, 7, 16\)"),
        (call(lambda a: a.update(key_padding_mask=torch.zeros(B, T).int())), "key_padding_mask: expected None or a bool tensor"),
        (call(lambda a: a.update(key_padding_mask=torch.zeros(B, T + 1))), "key_padding_mask: expected shape"),
        (call(lambda a: a.update(key_padding_mask=torch.zeros(B, T).requires_grad_())), "key_padding_mask: .* no gradient"),
        (call(lambda a: a.update(rows=8)), "rows: expected None, or 1 to 7, got 8"),
        (call(lambda a: a.update(rows=0)), "rows: expected None, or 1 to 7, got 0"),
    ],
)
def test_bad_arguments_are_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
