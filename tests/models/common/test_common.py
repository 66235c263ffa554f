"""The parity options, the parameter tables, the fusion encoders and the towers' positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastadapt import FusionEncoder
from fastadapt.models.common import parity, table
from fastadapt.models.common.fusion import EagerFusionEncoder, ReleasedFusionEncoder
from fastadapt.models.common.heads import BoxHead
from fastadapt.models.common.method import METHODS, method
from fastadapt.models.common.towers import image_positions, key_mask
from tests.modules.checks import randomise, with_gradients
from tests.tolerance import EXACT

OPTIONS = (parity.Parity("a", "one", "two"), parity.Parity("b", "three", "four"))


def test_parity_options_are_chosen_by_name_or_all_at_once():
    assert parity.chosen(OPTIONS, ()) == ()
    assert parity.chosen(OPTIONS, "released") == ("a", "b")
    assert parity.chosen(OPTIONS, ["b", "a", "b"]) == ("a", "b")
    assert parity.chosen(OPTIONS, "b") == ("b",)
    with pytest.raises(ValueError, match="parity: expected 'released' or some of a, b, got 'c', 'd'"):
        parity.chosen(OPTIONS, ["d", "a", "c"])
    assert parity.as_markdown(OPTIONS).splitlines()[2] == "| `a` | one | two |"


def test_parameters_are_counted_once_and_by_the_first_part_that_fits():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 4).requires_grad_(False)})
    model["c"] = model["a"]
    parts = {"weights": ("*.weight",), "a": ("a.*",), "none": ("x",), "rest": ("*",)}
    assert table.count_parts(model, parts) == [("weights", 6 + 12, 6), ("a", 3, 3), ("rest", 4, 0)]
    assert table.trained(model) == 9
    assert table.Share("x", 3, "y", 12).percent == 25
    with pytest.raises(ValueError, match="parts: expected a pattern for every parameter, got none for b.weight"):
        table.count_parts(model, {"a": ("a.*",)})


def test_methods_are_found_by_name():
    assert all(method(name).config.model_type == name for name in METHODS)
    with pytest.raises(ValueError, match="method: expected one of .*m2ist.*, got 'x'"):
        method("x")


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_fusion_encoders_are_one_function(pre_norm):
    sizes = (16, 4, 2, 24, 0.0)
    encoders = [kind(*sizes, pre_norm=pre_norm).double() for kind in (ReleasedFusionEncoder, EagerFusionEncoder, FusionEncoder)]
    randomise(encoders[0])
    torch_layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=pre_norm).double()
    tokens, positions = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True), torch.randn(5, 16, dtype=torch.float64)
    padding = torch.tensor([[False, False, False, False, True], [False, True, False, False, False]])
    found = []
    for encoder in encoders:
        encoder.load_state_dict(encoders[0].state_dict())
        found.append(with_gradients(encoder(tokens, positions, padding, rows=2), encoder, tokens=tokens))
    assert all(value.abs().max() > 0 for value in found[0].values())
    torch.testing.assert_close(found[1], found[0], **EXACT)
    torch.testing.assert_close(found[2], found[0], **EXACT)
    # without positions a layer is torch's own
    torch_layer.load_state_dict(encoders[0].layers[0].state_dict())
    expected = torch_layer(tokens, src_key_padding_mask=padding)
    got = encoders[1].layers[0](tokens.transpose(0, 1), torch.zeros(5, 1, 16, dtype=torch.float64), padding).transpose(0, 1)
    torch.testing.assert_close(got, expected, **EXACT)


def test_positions_are_added_to_queries_and_keys_alone():
    encoder = randomise(EagerFusionEncoder(8, 2, 1, 12, 0.0))
    x, positions = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    layer = encoder.layers[0]
    q = (x + positions).transpose(0, 1)
    attended, _ = layer.self_attn(q, q, x.transpose(0, 1))
    n = layer.norm1(x + attended.transpose(0, 1))
    expected = layer.norm2(n + layer.linear2(layer.linear1(n).relu()))
    torch.testing.assert_close(encoder(x, positions), expected, **EXACT)


@pytest.mark.parametrize("kind", [ReleasedFusionEncoder, EagerFusionEncoder, FusionEncoder])
def test_the_published_fusion_encoders_and_heads_have_their_parameters(kind):
    with torch.device("meta"):
        count = [table.trained(kind(256, 8, 6, 2048)), table.trained(kind(512, 8, 6, 2048, pre_norm=True))]
        heads = [table.trained(BoxHead(width)) for width in (256, 512)]
    assert count == [7_890_432, 18_915_328] and heads == [132_612, 527_364]


def test_the_box_head_is_between_zero_and_one():
    head = randomise(BoxHead(6))
    x = torch.randn(3, 6, dtype=torch.float64)
    first, second, third = head.layers
    torch.testing.assert_close(head(x), third(second(first(x).relu()).relu()).sigmoid(), **EXACT)


def test_image_positions_count_over_what_is_image():
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, 2], padding[:, :, 3] = True, True
    found = image_positions(padding, 8).view(3, 4, 8)
    for row, column in [(0, 0), (1, 2)]:
        y, x = 2 * math.pi * (row + 1) / 2, 2 * math.pi * (column + 1) / 3
        expected = [f(v / 10000 ** (2 * i / 4)) for v in (y, x) for i in range(2) for f in (math.sin, math.cos)]
        assert found[row, column].tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_key_masks_leave_padding_out(implementation):
    mask = key_mask(torch.tensor([[False, True]]), torch.float32, implementation)
    assert mask.shape == (1, 1, 1, 2)
    if implementation == "sdpa":
        assert mask.flatten().tolist() == [True, False]
    else:
        assert (torch.zeros(2) + mask.flatten()).softmax(0).tolist() == [1, 0]
