"""HiVG's cross-modal bridges: values and gradients from the equations, layouts, masks, folding, state dicts and errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastadapt import CrossModalBridge, CrossModalBridges, LoraLinear
from tests.modules.bridges import B, DIM, HEADS, L, SMALL, T, TEXT
from tests.modules.bridges import make, make_h1, make_states, plain, plain_text, plain_visual, run, with_gradients
from tests.tolerance import EXACT


@pytest.mark.parametrize("text_norm", [True, False])
@pytest.mark.parametrize("n", [1, 2, 12])
def test_values_and_all_gradients_are_the_equation(n, text_norm):
    bridges, h1, states = make(num_states=n, text_norm=text_norm), make_h1(), make_states(n)
    expected = with_gradients(plain, bridges, h1, states)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    torch.testing.assert_close(with_gradients(run, bridges, h1, states), expected, **EXACT)


def test_padded_words_do_not_matter_and_the_others_are_the_equation():
    bridges, h1, states = make(num_states=2), make_h1(), make_states(2)
    mask = torch.arange(T) >= torch.tensor([[2], [T], [4]])
    got = with_gradients(run, bridges, h1, states, mask)
    torch.testing.assert_close(got, with_gradients(plain, bridges, h1, states, mask), **EXACT)
    others = [f.masked_fill(mask[..., None], 7.0) for f in states]
    assert torch.equal(torch.stack(run(bridges, h1, others, mask)), got["h2"])
    assert all((got[f"states[{i}]"][mask] == 0).all() for i in range(2))


def test_a_caption_cut_after_its_words_is_one_whose_padding_is_masked():
    bridges, h1, states = make(), make_h1(), make_states()
    mask = (torch.arange(T) >= 3).expand(B, T)
    cut = run(bridges, h1, [states[0][:, :3]])
    torch.testing.assert_close(cut, run(bridges, h1, states, mask), **EXACT)
    assert not torch.allclose(cut[0], run(bridges, h1, states)[0])


def test_the_projections_are_those_of_torch_modules():
    """One bridge's weights in torch's own modules, which have the layouts that checkpoints have."""
    bridges, h1, states = make(3, num_states=2), make_h1(), make_states(2)
    weights = bridges.bridge_state_dict(1)
    modules = nn.ModuleDict(
        {
            "gate": nn.Linear(2 * TEXT, DIM),
            "norm": nn.LayerNorm(DIM),
            "attention": nn.MultiheadAttention(DIM, HEADS, batch_first=True),
            "fc1": nn.Linear(DIM, 4 * DIM),
            "fc2": nn.Linear(4 * DIM, DIM),
        }
    ).double()
    for name in ("gate", "norm", "fc1", "fc2"):
        modules[name].load_state_dict({kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias")})
    attention = {f"in_proj_{kind}": torch.cat([weights[f"{p}_proj.{kind}"] for p in "qkv"]) for kind in ("weight", "bias")}
    out = {f"out_proj.{kind}": weights[f"out_proj.{kind}"] for kind in ("weight", "bias")}
    modules["attention"].load_state_dict({**attention, **out})
    t = modules["gate"](torch.cat([F.layer_norm(f, (TEXT,)) * (1 + w) for f, w in zip(states, weights["w"])], -1))
    attended, _ = modules["attention"](modules["norm"](h1), t, t, need_weights=False)
    hidden = modules["fc1"](attended)
    expected = h1 + modules["fc2"](hidden * torch.sigmoid(1.702 * hidden))
    torch.testing.assert_close(run(bridges, h1, states)[1], expected, **EXACT)


def test_another_samples_caption_moves_nothing():
    bridges, h1, states = make(num_states=2), make_h1(), make_states(2)
    others = [torch.cat([f[:1], torch.randn_like(f[1:])]) for f in states]
    before, after = (torch.stack(run(bridges, h1, s)) for s in (states, others))
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def scrambled(bridges, h1: Tensor, states: list[Tensor]) -> list[Tensor]:
    """The released layout, from its formula: slot s of sample b holds word i of sample j, (i, j) = divmod(b * T + s, B)."""
    batch, outputs = len(h1), []
    for i in range(len(bridges)):
        t = plain_text(bridges, i, states)
        found = [[divmod(b * T + s, batch) for s in range(T)] for b in range(batch)]
        mixed = torch.stack([torch.stack([t[sample, word] for word, sample in slots]) for slots in found])
        outputs.append(plain_visual(bridges, i, h1, mixed))
    return outputs


def test_the_released_layout_mixes_the_samples_as_its_formula_says():
    bridges, h1, states = make(num_states=2, parity="released"), make_h1(4), make_states(2, 4)
    assert not bridges.text_norm
    expected = with_gradients(scrambled, bridges, h1, states)
    torch.testing.assert_close(with_gradients(run, bridges, h1, states), expected, **EXACT)
    others = [torch.cat([f[:3], torch.randn_like(f[3:])]) for f in states]
    assert not torch.allclose(torch.stack(run(bridges, h1, others))[:, 0], expected["h2"][:, 0])


@pytest.mark.parametrize("text_norm", [True, False])
def test_both_layouts_are_the_same_for_one_sample(text_norm):
    released, correct = (make(parity=parity, text_norm=text_norm) for parity in ("released", None))
    correct.load_state_dict(released.state_dict())
    h1, states = make_h1(1), make_states(batch=1)
    assert torch.equal(torch.stack(run(released, h1, states)), torch.stack(run(correct, h1, states)))


def test_a_batch_is_its_samples_one_by_one():
    bridges, h1, states = make(), make_h1(), make_states()
    alone = [torch.stack(run(bridges, h1[b : b + 1], [states[0][b : b + 1]])) for b in range(B)]
    torch.testing.assert_close(torch.stack(run(bridges, h1, states)), torch.cat(alone, 1), **EXACT)
    assert run(bridges, h1[:0], [states[0][:0]])[0].shape == (0, L, DIM)


def test_without_adaptive_weights_the_state_is_the_text():
    bridges = make(text_dim=DIM, adaptive=False)
    assert not bridges.text_norm
    h1, states = make_h1(), make_states(width=DIM)
    expected = with_gradients(plain, bridges, h1, states)
    assert expected.keys() == {"h2", "h1", "states[0]", *(name for name, _ in bridges.named_parameters())}
    assert not any(name.startswith(("gate", "token")) for name in expected)
    torch.testing.assert_close(with_gradients(run, bridges, h1, states), expected, **EXACT)


def test_stacked_states_are_the_list():
    bridges, h1, states = make(num_states=2), make_h1(), make_states(2)
    assert torch.equal(torch.stack(run(bridges, h1, torch.stack(states, 2))), torch.stack(run(bridges, h1, states)))


def test_a_group_is_its_bridges_one_by_one():
    group, h1, states = make(4, num_states=2), make_h1(), make_states(2)
    together = run(group, h1, states)
    for i, expected in enumerate(together):
        single = CrossModalBridge(**SMALL, num_states=2, dtype=torch.float64)
        single.load_bridge_state_dict(0, group.bridge_state_dict(i))
        torch.testing.assert_close(single(h1, states), expected, **EXACT)


def test_folding_is_exact_and_leaves_the_bridges_as_they_were():
    bridges, h1, states = make(), make_h1(), make_states()
    before = copy.deepcopy(bridges.state_dict())
    folded, expected = bridges.folded(), run(bridges, h1, states)
    torch.testing.assert_close(run(folded, h1, states), expected, **EXACT)
    torch.testing.assert_close(bridges.state_dict(), before, rtol=0, atol=0)
    assert bridges.training and all(p.requires_grad for p in bridges.parameters())
    assert not any(p.requires_grad for p in folded.parameters())
    removed = sum(p.numel() for p in bridges[0].out_proj.parameters())
    count = [sum(p.numel() for p in side.parameters()) for side in (bridges[0], folded[0])]
    assert count[0] - count[1] == removed == DIM * DIM + DIM
    assert not folded.eval().training
    with pytest.raises(RuntimeError, match="for inference only"):
        nn.Sequential(folded).train()


def test_folding_twice_or_over_an_adapter_is_refused():
    bridges = make()
    with pytest.raises(ValueError, match="out_proj: expected an nn.Linear.* got Identity"):
        bridges.folded().folded()
    bridges[1].out_proj = LoraLinear.from_linear(bridges[1].out_proj)
    with pytest.raises(ValueError, match="out_proj: expected an nn.Linear.* got LoraLinear"):
        bridges.folded()


def test_the_visual_projections_take_a_low_rank_update():
    bridges, h1, states = make(), make_h1(), make_states()
    expected = run(bridges, h1, states)
    bridges[0].q_proj = LoraLinear.from_linear(bridges[0].q_proj, r=2)
    torch.testing.assert_close(run(bridges, h1, states), expected, **EXACT)


def test_parameters_start_as_those_of_torch_modules():
    bridges = CrossModalBridges(2, dim=64, text_dim=32, num_states=2, num_heads=4)
    weights = bridges.bridge_state_dict(0)
    assert abs(weights["w"].mean()) < 0.05 and abs(weights["w"].std() - 1) < 0.05
    for name in ("gate", "k_proj", "v_proj", "q_proj", "fc2"):
        weight = weights[f"{name}.weight"]
        bound = 1 / math.sqrt(weight.shape[1])
        for kind in ("weight", "bias"):
            assert 0.8 * bound < weights[f"{name}.{kind}"].abs().max() <= bound, (name, kind)


def test_zero_init_starts_as_the_identity():
    bridges, h1 = make(zero_init=True), make_h1()
    assert all(torch.equal(h2, h1) for h2 in run(bridges, h1, make_states()))
    assert not torch.equal(run(make(), h1, make_states())[0], h1)


def test_state_dict_round_trip_and_deepcopy():
    bridges, h1, states = make(num_states=2), make_h1(), make_states(2)
    fresh = make(num_states=2)
    fresh.load_state_dict(bridges.state_dict())
    expected = torch.stack(run(bridges, h1, states))
    assert torch.equal(torch.stack(run(fresh, h1, states)), expected)
    assert torch.equal(torch.stack(run(copy.deepcopy(bridges), h1, states)), expected)


def test_loading_one_bridge_leaves_the_others():
    bridges, other = make(3), make(3)
    before = copy.deepcopy(bridges.state_dict())
    bridges.load_bridge_state_dict(1, other.bridge_state_dict(2))
    torch.testing.assert_close(bridges.bridge_state_dict(1), other.bridge_state_dict(2), rtol=0, atol=0)
    for name, value in bridges.state_dict().items():
        if not name.startswith("visual.1."):
            same = [torch.equal(a, b) for a, b in zip(value, before[name])]
            assert all(same) if name.startswith("visual.") else same == [True, False, True]


def test_representation_names_the_options():
    assert "num_states=2, num_tokens=5, text_dim=6, adaptive=True, text_norm=True, parity=None" in repr(make(num_states=2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make(0), "num_bridges: expected at least 1, got 0"),
        (lambda: make(num_states=0), "num_states: expected at least 1, got 0"),
        (lambda: make(num_states=2, adaptive=False, text_dim=DIM), "num_states: expected 1, .* got 2"),
        (lambda: make(adaptive=False), "text_dim: expected dim = 16, .* got 6"),
        (lambda: make(num_heads=3), "dim: expected a multiple of num_heads = 3, got 16"),
        (lambda: make(parity="paper"), "parity: expected None or 'released', got 'paper'"),
        (lambda: make().encode_text(make_states(2)), "states: expected num_states = 1 text states, got 2"),
        (lambda: make().encode_text(make_states(width=4)), r"states\[0\]: expected shape \(any, any, 6\), got .* \(3, 5, 4\)"),
        (
            lambda: make(num_states=2).encode_text([*make_states(), torch.randn(B, 2, TEXT)]),
            r"states\[1\]: expected shape \(3, 5, 6\), got shape \(3, 2, 6\)",
        ),
        (lambda: make().encode_text(torch.randn(B, T, TEXT)), r"states: expected shape \(any, any, 1, 6\), got"),
        (lambda: make(num_tokens=4).encode_text(make_states()), "states: expected at most num_tokens = 4 tokens, got 5"),
        (lambda: make().encode_text(make_states(dtype=torch.float32)), "states: expected torch.float64, got torch.float32"),
        (
            lambda: run(make(), make_h1(), make_states(), torch.zeros(B, T + 1, dtype=torch.bool)),
            r"key_padding_mask: expected shape \(3, 5\), got shape \(3, 6\)",
        ),
        (lambda: run(make(), make_h1(), make_states(), torch.zeros(B, T)), "key_padding_mask: .* got torch.float32"),
        (
            lambda: make(parity="released").encode_text(make_states(), torch.zeros(B, T, dtype=torch.bool)),
            "key_padding_mask: expected None, .* got Tensor",
        ),
        (lambda: run(make(), make_h1(dtype=torch.float32), make_states()), "h1: expected torch.float64, got torch.float32"),
        (lambda: run(make(), make_h1(2), make_states()), r"h1: expected shape \(3, any, 16\), got shape \(2, 7, 16\)"),
        (lambda: make().load_bridge_state_dict(0, {}), r"state: expected the keys \['fc1.bias'.* got \[\]"),
        (
            lambda: make().load_bridge_state_dict(0, make(num_states=2).bridge_state_dict(0)),
            r"state\['w'\]: expected shape \(1, 5, 6\), got shape \(2, 5, 6\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
