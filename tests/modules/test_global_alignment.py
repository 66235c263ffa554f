"""GlobalAlignment against its equations written with torch's attention, which averages its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastadapt import GlobalAlignment
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast
from tests.tolerance import EXACT

B, H, W, L, WIDTH = 2, 6, 4, 5, 8
DOUBLE = torch.float64


def attention(ours: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask=None) -> torch.Tensor:
    """torch's multi-head attention with the parameters of `ours`."""
    sizes = ours.embed_dim, ours.num_heads
    weights = ours.in_proj_weight, ours.in_proj_bias, None, None, False, 0.0, ours.out_proj.weight, ours.out_proj.bias
    inputs = (x.transpose(0, 1) for x in (query, key, value))
    y, _ = F.multi_head_attention_forward(*inputs, *sizes, *weights, key_padding_mask=mask, need_weights=True)
    return y.transpose(0, 1)


def wave(t: int, channels: int) -> torch.Tensor:
    functions = torch.sin, torch.cos
    frequencies = [10000 ** (-2 * (i // 2) / channels) for i in range(channels)]
    return torch.stack([functions[i % 2](torch.tensor(t * f, dtype=DOUBLE)) for i, f in enumerate(frequencies)])


def rewritten(vision: torch.Tensor, words: torch.Tensor, mask: torch.Tensor | None, decoder: GlobalAlignment) -> torch.Tensor:
    """The decoder, equation by equation."""
    b, c, h, w = vision.shape
    place, order = torch.zeros(h * w, c, dtype=vision.dtype), torch.zeros(words.shape[1], c, dtype=vision.dtype)
    for row in range(h):
        for column in range(w):
            place[row * w + column] = torch.cat([wave(column, c // 2), wave(row, c // 2)])
    for t in range(words.shape[1]):
        order[t] = wave(t, c)
    v = vision.view(b, c, h * w).permute(0, 2, 1)
    for layer in decoder.layers:
        x = layer.norm1(v)
        v = v + layer.self_attn_norm(attention(layer.self_attn, x + place, x + place, x))
        y = attention(layer.cross_attn, layer.norm2(v) + place, words + order, words, mask)
        v = v + layer.cross_attn_norm(y)
        first, _, _, norm, second = layer.ffn
        v = v + second(norm(torch.relu(first(layer.norm3(v)))))
    return decoder.norm(v).permute(0, 2, 1).reshape(b, c, h, w)


def decode(dtype: torch.dtype = DOUBLE, **config) -> tuple[GlobalAlignment, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A decoder, vision, words and a mask of the padding at their end."""
    decoder = randomise(GlobalAlignment(2, WIDTH, 2, 12, **({"dropout": 0.0} | config))).to(dtype)
    vision, words = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((B, WIDTH, H, W), (B, L, WIDTH)))
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[0, 3:] = True
    return decoder, vision, words, mask


@pytest.mark.parametrize("masked", [False, True])
def test_decoder_is_its_equations(masked):
    decoder, vision, words, mask = decode()
    mask = mask if masked else None
    got, expected = decoder(vision, words, mask), rewritten(vision, words, mask, decoder)
    torch.testing.assert_close(got, expected, **EXACT)
    wanted, grad = [vision, words, *decoder.parameters()], torch.randn_like(expected)
    got, expected = (torch.autograd.grad(y, wanted, grad) for y in (got, expected))
    torch.testing.assert_close(got, expected, **EXACT)
    assert all(g.any() for g in got)


def test_true_in_the_padding_mask_hides_a_word():
    decoder, vision, words, mask = decode()
    changed = torch.where(mask[..., None], 5.0, words)
    torch.testing.assert_close(decoder(vision, changed, mask), decoder(vision, words, mask), **EXACT)
    assert not torch.allclose(decoder(vision, changed, ~mask), decoder(vision, words, ~mask))


def test_decoder_knows_places_only_by_positions():
    decoder, vision, words, _ = decode()
    turned = vision.flip(2)
    assert not torch.allclose(decoder(turned, words).flip(2), decoder(vision, words))
    decoder.vision_positions = decoder.word_positions = lambda *size, like: torch.zeros((), dtype=like.dtype)
    torch.testing.assert_close(decoder(turned, words).flip(2), decoder(vision, words), **EXACT)
    torch.testing.assert_close(decoder(vision, words.flip(1)), decoder(vision, words), **EXACT)


def test_decoder_drops_while_training_only():
    decoder, vision, words, mask = decode(dropout=0.3)
    torch.manual_seed(1)
    first = decoder(vision, words, mask)
    assert not torch.allclose(decoder(vision, words, mask), first)
    torch.manual_seed(1)
    assert torch.equal(decoder(vision, words, mask), first)
    torch.testing.assert_close(decoder.eval()(vision, words, mask), rewritten(vision, words, mask, decoder), **EXACT)


def test_decoder_has_its_parameters_and_runs_at_full_size_on_meta():
    decoder = GlobalAlignment(device="meta")
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 7_899_136
    y = decoder(torch.empty(1, 512, 26, 26, device="meta"), torch.empty(1, 17, 512, device="meta"))
    assert y.shape == (1, 512, 26, 26) and y.is_contiguous(memory_format=torch.channels_last)


def test_tables_are_made_once_for_each_size_and_dtype():
    decoder, vision, words, _ = decode()
    made: list = []
    for table in (decoder.vision_positions, decoder.word_positions):
        table.make = lambda *size, make=table.make: made.append(size) or make(*size)
    for _ in range(3):
        decoder(vision, words)
    cpu = DOUBLE, torch.device("cpu")
    expected = [(H, W, WIDTH, *cpu), (L, WIDTH, *cpu)]
    assert made == expected
    decoder(vision, words[:, :2]), decoder(vision, words)
    assert made == [*expected, (2, WIDTH, *cpu)]
    decoder.float()(vision.float(), words.float())
    assert len(made) == 5 and {size[-2] for size in made[3:]} == {torch.float32}
    assert not any("positions" in name for name in decoder.state_dict())


def test_a_table_from_inference_mode_serves_training():
    decoder, vision, words, _ = decode()
    with torch.inference_mode():
        expected = decoder(vision, words)
    got = decoder(vision, words)
    got.sum().backward()
    assert torch.equal(got, expected) and vision.grad.any()


@pytest.mark.parametrize("check", [round_trips, compiles, runs_under_autocast])
def test_it_stands_what_every_module_does(check):
    decoder, vision, words, mask = decode()
    check(decoder, [vision, words], lambda module, inputs: module(*inputs, mask))


def call(vision: tuple, words: tuple, mask: torch.Tensor | None = None) -> torch.Tensor:
    return GlobalAlignment(1, WIDTH, 2, 4)(torch.zeros(vision), torch.zeros(words), mask)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: GlobalAlignment(1, 10, 2), "d_model: expected a multiple of 4, got 10"),
        (lambda: GlobalAlignment(1, 8, 3), "num_heads: expected a divisor"),
        (lambda: GlobalAlignment(1, 8, 2, dropout=1.0), "dropout: expected .* got 1.0"),
        (lambda: call((B, WIDTH, H), (B, L, WIDTH)), "vision: expected shape"),
        (lambda: call((B, WIDTH, H, W), (B, L, 4)), r"words: expected shape \(2, any, 8\)"),
        (lambda: call((B, WIDTH, H, W), (B, L, WIDTH), torch.zeros(B, L)), "key_padding_mask: expected None or a bool tensor"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
