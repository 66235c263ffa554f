"""M2IST: its three arms against each other and its parts against their equations, its counts, and its way through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BertModel, DetrConfig, DetrModel

import fastadapt
from fastadapt.models.common.arms import ARMS
from fastadapt.models.common.parity import as_markdown
from fastadapt.models.common.table import count_parts, trained
from fastadapt.models.common.towers import DetrTower, bert_states
from fastadapt.models.m2ist import M2ISTConfig, M2ISTForGrounding
from fastadapt.models.m2ist.configuration import PARITY
from fastadapt.models.m2ist.method import METHOD, side_parameters
from fastadapt.prove.saved import saved_bytes
from tests.models import checks
from tests.tolerance import EXACT

README = Path(fastadapt.__file__).parent / "models" / "m2ist" / "README.md"


def make(arm: str = "fastadapt", **changes) -> M2ISTForGrounding:
    return checks.make(METHOD, arm=arm, **changes)


@pytest.mark.parametrize("parity", [(), "released"])
def test_the_arms_agree_in_float64(parity):
    model = make("release", parity=parity)
    dead = [name for name, _ in model.named_parameters() if name.startswith("dead.")]
    assert len(dead) == (22 if parity else 0)
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_double, dead)


def test_the_arms_agree_in_float32_at_the_published_size():
    """Every width and depth as published, as it starts, on a smaller image."""
    model = M2ISTForGrounding(M2ISTConfig.preset("refcoco", arm="release", image_size=64)).train()
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_single)


def test_parameters_are_the_published_ones():
    with torch.device("meta"):
        released = M2ISTForGrounding(M2ISTConfig.preset("refcoco", parity="released"))
        model = M2ISTForGrounding(M2ISTConfig.preset("refcoco"))
        longer = M2ISTForGrounding(M2ISTConfig.preset("refcocog"))
    assert (side_parameters(released), trained(released)) == (3_185_794, 11_579_526)
    assert (side_parameters(model), trained(model)) == (2_975_232, 11_579_526 - 210_562)
    assert trained(longer) - trained(model) == 20 * 256
    dead = [p for name, p in released.named_parameters() if name.startswith("dead.")]
    assert (len(dead), sum(p.numel() for p in dead)) == (34, 210_562)
    parts = {part: (total, count) for part, total, count in count_parts(released, METHOD.parts)}
    assert parts["ResNet-50"] == (23_454_912, 0)
    assert parts["DETR encoder and input projection"] == (7_890_432 + 524_544, 0)
    assert parts["fusion encoder"] == (7_890_432, 7_890_432) and parts["box head"] == (132_612, 132_612)
    assert parts["projections"][1] == 65_792 + 196_864 and parts["REG token and positions"][1] == 256 + 107_776
    # what the training script prints: the shared projections are in both towers' sums
    vision, text = (sum(p.numel() for p in side.parameters()) for side in (released.vision_side, released.text_side))
    norms = {name: 6 * 2 * width for name, width in (("vision", 256), ("text", 768))}
    assert (vision + norms["vision"], text + norms["text"] + 198_274) == (797_184, 2_586_754)
    (published, *_) = METHOD.shares(released)
    assert f"{published.percent:.2f}" == "2.11" and published.whole == 151_000_000


def test_learning_rates_are_the_recipes():
    groups = {group["lr"]: group["params"] for group in make("strong", parity=["dead_parameters"]).parameter_groups(1e-4)}
    assert sorted(groups) == [pytest.approx(1e-5), 1e-4]
    model = make("strong")
    groups = {round(group["lr"], 9): sum(p.numel() for p in group["params"]) for group in model.parameter_groups(1e-4)}
    assert groups == {1e-5: side_parameters(model), 1e-4: trained(model) - side_parameters(model)}


@pytest.mark.parametrize("arm", ARMS)
def test_it_trains(arm):
    checks.trains(METHOD, arm)


@pytest.mark.parametrize("arm", ARMS)
def test_it_runs_under_autocast(arm):
    checks.runs_under_autocast(METHOD, make(arm, dtype=torch.float32))


def test_it_compiles_without_a_graph_break():
    tiny = M2ISTConfig.PRESETS["tiny"]
    shallow = {
        "vision_config": {**tiny["vision_config"], "encoder_layers": 1},
        "text_config": {**tiny["text_config"], "num_hidden_layers": 1},
    }
    checks.compiles(METHOD, make(**shallow, side_layers=1, fusion_layers=1))


def test_it_saves_and_loads(tmp_path):
    checks.saves_and_loads(METHOD, make(dtype=torch.float32), tmp_path)


def test_its_adapters_travel(tmp_path):
    checks.adapters_travel(METHOD, make(), tmp_path, text_length=7)


def test_the_towers_come_from_transformers_checkpoints(tmp_path):
    model = make()
    detr = DetrModel(DetrConfig(**{**model.config.vision_config.to_dict(), "decoder_layers": 1}))
    bert = BertModel(model.config.text_config)
    detr.save_pretrained(tmp_path / "detr")
    bert.save_pretrained(tmp_path / "bert")
    model.load_towers(vision=tmp_path / "detr", text=tmp_path / "bert")
    for own, other in ((model.vision, detr), (model.text, bert)):
        loaded = other.state_dict()
        assert all(torch.equal(tensor, loaded[name].to(tensor)) for name, tensor in own.state_dict().items())
    with pytest.raises(ValueError, match="sources: expected some of vision, text, got prior"):
        model.load_towers(prior=tmp_path)
    with pytest.raises(ValueError, match=r"text\.embeddings.* in .*detr, got none"):
        model.load_towers(text=tmp_path / "detr")
    wider = make(text_config={**model.config.text_config.to_dict(), "hidden_size": 64})
    with pytest.raises(ValueError, match=r"text\.embeddings.*shape \(128, 64\) .*got shape \(128, 32\)"):
        wider.load_towers(text=tmp_path / "bert")


def test_the_vision_tower_is_transformers_detr():
    config = make().config.tower("vision_config")
    config.decoder_layers = 1
    detr = DetrModel(config).double().eval()
    tower = DetrTower(config, folded=True).double().eval()
    own = tower.state_dict()
    for name, buffer in detr.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    tower.load_state_dict({name: tensor for name, tensor in detr.state_dict().items() if name in own})
    images, mask = torch.randn(2, 3, 96, 128, dtype=torch.float64), torch.ones(2, 96, 128)
    mask[1, 64:], mask[0, :, 96:] = 0, 0
    expected = detr(images, mask).encoder_last_hidden_state
    states = tower(images, mask)
    assert states.padding.sum() == 3 + 4
    # transformers computes the positions in the images' dtype, this package in float32
    torch.testing.assert_close(states.output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ["release", "strong"])
def test_the_text_tower_is_transformers_bert(arm):
    model = make(arm).eval()
    inputs = checks.make_inputs(METHOD, model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    states = bert_states(model.text, ids, mask, 3)
    hidden = model.text(ids, mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close([states.embedding, states.output], [hidden[0], hidden[-1]], **EXACT)
    layer, (a, g) = model.text.encoder.layer[0], states.taps[0]
    torch.testing.assert_close(layer.output.LayerNorm(g + a), hidden[1], **EXACT)
    assert len(states.taps) == 3


def test_the_released_bert_normalises_twice_and_has_no_token_types():
    model = make("release").eval()
    inputs = checks.make_inputs(METHOD, model)
    states = bert_states(model.text, inputs["input_ids"], inputs["attention_mask"], 3, double_norm=True, types=False)
    embeddings, layer = model.text.embeddings, model.text.encoder.layer[0]
    x = embeddings.word_embeddings(inputs["input_ids"]) + embeddings.position_embeddings.weight[:6]
    x = embeddings.LayerNorm(x)
    torch.testing.assert_close(states.embedding, x, **EXACT)
    keys = torch.zeros(2, 1, 1, 6, dtype=x.dtype).masked_fill(inputs["attention_mask"][:, None, None] == 0, -10000)
    dense, norm = layer.attention.output.dense, layer.attention.output.LayerNorm
    a = norm(norm(dense(layer.attention.self(x, keys)[0]) + x) + x)
    torch.testing.assert_close(states.taps[0].attention, a, **EXACT)
    g = layer.output.dense(F.gelu(layer.intermediate.dense(a)))
    torch.testing.assert_close(states.taps[0].feed_forward, g, **EXACT)


def test_the_released_bert_runs_its_norms_as_often_as_the_release():
    model, calls = make("release", parity="released").eval(), []
    for index in (0, 3):  # of the three tapped layers, and not
        norm = model.text.encoder.layer[index].attention.output.LayerNorm
        norm.register_forward_hook(lambda *_, index=index: calls.append(index))
    model(**checks.make_inputs(METHOD, model))
    assert (calls.count(0), calls.count(3)) == (3, 1)


def test_padding_is_seen_by_none():
    model = make().eval()
    inputs = checks.make_inputs(METHOD, model)
    boxes = model(**inputs).pred_boxes
    other = dict(inputs)
    other["pixel_values"] = inputs["pixel_values"].clone()
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, 4:] = 1
    torch.testing.assert_close(model(**other).pred_boxes, boxes, **EXACT)
    other["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    assert (model(**other).pred_boxes - boxes).abs().max() > 1e-6
    whole = {**inputs, "pixel_mask": torch.ones_like(inputs["pixel_mask"])}
    assert torch.equal(model(**{**inputs, "pixel_mask": None}).pred_boxes, model(**whole).pred_boxes)


def test_nothing_enters_the_towers():
    """What the backward keeps of them is their taps: no parameter of theirs has a gradient, and no activation is kept."""
    model = make(dtype=torch.float32)
    inputs = checks.make_inputs(METHOD, model)
    with torch.no_grad():
        taps = [tap for layer in model.vision(inputs["pixel_values"], inputs["pixel_mask"]).taps for tap in layer]
    assert not any(tap.requires_grad for tap in taps)
    kept = saved_bytes(lambda: model.vision_side(taps, ()), exclude=model.parameters())
    assert kept == sum(tap.nbytes for tap in taps)
    model(**inputs).loss.backward()
    assert all(p.grad is None for tower in (model.vision, model.text) for p in tower.parameters())


def test_towers_keep_still_unless_the_release_is_asked_for():
    model, released = make().train(), make(parity=["tower_dropout"]).train()
    assert model.fusion.training and not any(module.training for module in model.text.modules())
    assert all(module.training for module in released.text.modules())
    inputs = checks.make_inputs(METHOD, model)
    checks.without_dropout(model.fusion), checks.without_dropout(released.fusion)
    first, second = ([m(**inputs).loss for _ in range(2)] for m in (model, released))
    assert torch.equal(*first) and not torch.equal(*second)


@pytest.mark.parametrize("arm", ARMS)
def test_dropout_is_reproducible(arm):
    model = make(arm)
    inputs, losses = checks.make_inputs(METHOD, model), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(checks.results(model, inputs))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert losses[0]["output loss"] != losses[2]["output loss"]


def test_starts_are_the_releases_but_for_the_biases():
    model = M2ISTForGrounding(M2ISTConfig.preset("tiny", bottleneck=64))
    uniform = M2ISTForGrounding(M2ISTConfig.preset("tiny", parity=["uniform_vision_biases"]))
    assert 0.018 < model.vision_side.adapters[0].shared_up.weight.std() < 0.022
    bound = (6 / (16 + 64)) ** 0.5
    assert 0.9 * bound < model.vision_side.adapters[1].down_proj.weight.abs().max() <= bound
    for name, parameter in model.named_parameters():
        if "_side" in name and name.endswith("proj.bias"):
            assert not parameter.any()
    biases = [p for n, p in uniform.vision_side.named_parameters() if "proj.bias" in n]
    assert len(biases) == 3 * 3 and all(0 <= b.min() and b.max() <= 1 and b.std() > 0.1 for b in biases)
    assert not any(p.any() for n, p in uniform.text_side.named_parameters() if "proj.bias" in n or "shared_up.bias" in n)
    for layer in model.fusion.layers:
        assert layer.linear1.weight.abs().max() <= (6 / (16 + 32)) ** 0.5 and not layer.self_attn.out_proj.bias.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": "fast"}, "arm: expected one of release, strong, fastadapt, got 'fast'"),
        ({"parity": ["bert"]}, "parity: expected 'released' or some of bert_double_norm, .*, got 'bert'"),
        ({"image_size": 100}, "image_size: expected a multiple of 32, got 100"),
        ({"side_layers": 4}, "side_layers: expected 1 to 3, as many as the towers have, got 4"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        M2ISTConfig.preset("tiny", **changes)


def test_bad_presets_and_inputs_are_named():
    with pytest.raises(ValueError, match=r"preset: expected one of refcoco, refcoco\+, refcocog, tiny, got 'coco'"):
        M2ISTConfig.preset("coco")
    model = make()
    inputs = checks.make_inputs(METHOD, model)
    for name, shape in {"pixel_values": (2, 3, 64, 64), "input_ids": (2, 5), "labels": (2, 3)}.items():
        wrong = inputs[name].new_zeros(shape)
        with pytest.raises(ValueError, match=f"{name}: expected .*shape .*got "):
            model(**{**inputs, name: wrong})
    with pytest.raises(ValueError, match="input_ids: expected shape .*, got None"):
        model(**{**inputs, "input_ids": None})


def test_the_readme_has_the_parity_table():
    assert checks.in_the_readme(README.read_text(), as_markdown(PARITY))
