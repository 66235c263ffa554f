"""The collapsed segmentation head against transposed convolutions and a dot product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import saved_bytes
from fastadapt import SegmentationHead
from tests.modules.checks import compiles, randomise, round_trips, runs_under_autocast, with_gradients
from tests.tolerance import EXACT, no_worse_than

B, H, W, C = 2, 3, 4, 5


def plain(module: SegmentationHead, tokens: Tensor, sentence: Tensor, size: tuple[int, int]) -> Tensor:
    """As the released code computes it: the enlarged map times the sentence spread over it, summed."""
    features = module.layers(tokens.transpose(1, 2).unflatten(2, size))
    spread = sentence[:, :, None, None].repeat(1, 1, *features.shape[2:])
    return (features * spread).sum(1, keepdim=True)


def make(dtype: torch.dtype = torch.float64, depth: int = 3, channels: int = C, **sizes: int):
    module = randomise(SegmentationHead(channels, depth)).to(dtype)
    size = sizes.get("height", H), sizes.get("width", W)
    tokens = torch.randn(B, size[0] * size[1], channels, dtype=dtype, requires_grad=True)
    return module, tokens, torch.randn(B, channels, dtype=dtype, requires_grad=True), size


def run(module, inputs):
    return module(*inputs, (H, W))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_logits_and_gradients_are_the_long_forms(depth):
    module, tokens, sentence, size = make(depth=depth)
    found, expected = (
        with_gradients(call(tokens, sentence, size), module, tokens=tokens, sentence=sentence)
        for call in (module, lambda *args: plain(module, *args))
    )
    assert found["y"].shape == (B, 1, 2**depth * H, 2**depth * W)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_eager(dtype):
    module, *inputs, size = make(dtype, channels=32, height=7, width=7)
    wide, leaves = SegmentationHead(32, dtype=torch.float64), [x.detach().double().requires_grad_() for x in inputs]
    wide.load_state_dict(module.state_dict())
    ours = with_gradients(module(*inputs, size), module, x=inputs[0], e=inputs[1])
    eager = with_gradients(plain(module, *inputs, size), module, x=inputs[0], e=inputs[1])
    no_worse_than(ours, eager, with_gradients(plain(wide, *leaves, size), wide, x=leaves[0], e=leaves[1]))


def test_state_dict_compile_autocast_and_an_empty_batch():
    module, tokens, sentence, size = make()
    round_trips(module, [tokens, sentence], run)
    compiles(module, [tokens, sentence], run)
    runs_under_autocast(module, [tokens.detach(), sentence.detach()], run)
    assert module(tokens[:0], sentence[:0], size).shape == (0, 1, 8 * H, 8 * W)
    assert SegmentationHead(C).layers[0].weight.shape == (C, C, 2, 2)


def test_hivgs_head_is_28_million_multiply_adds_in_place_of_4316():
    module = SegmentationHead(device="meta")
    assert sum(parameter.numel() for parameter in module.parameters()) == 3_145_728

    def cost(call, batch: int) -> tuple[int, int]:
        """Multiply-adds, and bytes kept for the backward."""
        tokens, sentence = (torch.empty(batch, *shape, device="meta", requires_grad=True) for shape in ((196, 512), (512,)))
        with FlopCounterMode(display=False) as counter:
            kept = saved_bytes(lambda: call(tokens, sentence, (14, 14)), [tokens, sentence, *module.parameters()])
        return counter.get_total_flops() // 2, kept

    found = {}
    for name, call in {"collapsed": module, "long": lambda *args: plain(module, *args)}.items():
        one, two = cost(call, 1), cost(call, 2)
        macs, kept = (b - a for a, b in zip(one, two))
        print(f"{name}: {macs / 1e6:.1f} MMAC, {kept / 2**20:.2f} MiB kept a sample")
        found[name] = round(macs / 1e6, 1), kept, two[1] - 2 * kept
    copies = 3 * 4 * 4 * 512**2  # of the weights, in the products' order
    assert found["collapsed"] == (28.4, 4 * 512 * (4 + 16 + 64), copies)
    assert found["long"][0] == 4315.9 and found["long"][1] > 56 * 2**20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SegmentationHead(C, 0), "depth: expected at least 1, got 0"),
        (lambda: SegmentationHead(C)(torch.zeros(B, 11, C), torch.zeros(B, C), (H, W)), "tokens: .* got shape"),
        (lambda: SegmentationHead(C)(torch.zeros(B, 12, C), torch.zeros(1, C), (H, W)), "sentence: .* got shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
