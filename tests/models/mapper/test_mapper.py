"""MaPPER: its three arms against each other and its parts against their equations, its counts, and its way through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import BertModel, CLIPTextModelWithProjection, Dinov2Model

import fastadapt
from fastadapt import SentenceCache
from fastadapt.models.common.arms import ARMS
from fastadapt.models.common.fusion import EagerFusionEncoder
from fastadapt.models.common.parity import as_markdown
from fastadapt.models.common.table import count_parts, trained
from fastadapt.models.mapper import MaPPERConfig, MaPPERForGrounding
from fastadapt.models.mapper.adapters import EagerDyPA, EagerLoCA
from fastadapt.models.mapper.configuration import PARITY
from fastadapt.models.mapper.method import METHOD, PUBLISHED_TOWERS, tuned_parameters
from fastadapt.models.mapper.towers import image_states, prior_states, text_states
from tests.models import checks
from tests.tolerance import EXACT

README = Path(fastadapt.__file__).parent / "models" / "mapper" / "README.md"


def make(arm: str = "fastadapt", **changes) -> MaPPERForGrounding:
    return checks.make(METHOD, arm=arm, **changes)


def is_inert(name: str) -> bool:
    """A bias of a convolution before a batch norm with the batch's statistics, which take it out again."""
    return name.endswith("_conv.bias")


@pytest.mark.parametrize("parity", [(), "released"])
def test_the_arms_agree_in_float64(parity):
    model = make("release", parity=parity)
    dead = [name for name, _ in model.named_parameters() if name.startswith("dead.")]
    assert len(dead) == (4 if parity else 0)
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_double, dead)


def test_the_arms_agree_in_float32_at_the_published_size():
    """Every width and depth as published, as it starts, on a smaller image and with smaller vocabularies."""
    config = MaPPERConfig.preset("refcoco")
    small = {
        "vision_config": {**config.vision_config.to_dict(), "image_size": 70},
        "text_config": {**config.text_config.to_dict(), "vocab_size": 64},
        "prior_config": {**config.prior_config.to_dict(), "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63},
    }
    model = MaPPERForGrounding(MaPPERConfig.preset("refcoco", arm="release", parity=["normal_dypa"], **small)).train()
    with torch.no_grad():
        for layer in (3, 7, 11):  # at some starts no word opens a gate
            model.text.encoder.layer[layer].adapter.gate_proj.bias.fill_(1)

    def same(found, expected):
        assert all(value.abs().max() < 1e-6 for name, value in found.items() if is_inert(name))
        found, expected = ({k: v for k, v in each.items() if not is_inert(k)} for each in (found, expected))
        checks.same_in_single(found, expected)

    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model, 1), same)


@pytest.mark.parametrize("recompute", [True, False])
def test_recomputing_changes_nothing(recompute):
    model = checks.without_dropout(make("strong"))
    twin = make(recompute=recompute)
    twin.load_state_dict(model.state_dict())
    blocks = [getattr(layer, "recompute", None) for layer in twin.vision.encoder.layer]
    assert blocks == [False, None, recompute, None] and twin.fusion.recompute == recompute
    inputs = checks.make_inputs(METHOD, model)
    found = checks.results(checks.without_dropout(twin), inputs)
    checks.same_in_double(found, checks.results(model, inputs))
    # and the running statistics have moved once
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), **EXACT)
    assert model.vision.encoder.layer[1].adapter.point_norm.num_batches_tracked == 1


def test_parameters_are_the_published_ones():
    with torch.device("meta"):
        released = MaPPERForGrounding(MaPPERConfig.preset("refcoco", parity="released"))
        model = MaPPERForGrounding(MaPPERConfig.preset("refcoco"))
        longer = MaPPERForGrounding(MaPPERConfig.preset("refcocog"))
        bert = BertModel(model.config.text_config)
    assert (tuned_parameters(released), trained(released)) == (2_774_043, 11_547_167)
    assert (tuned_parameters(model), trained(model)) == (2_774_043 - 49_248, 11_547_167 - 49_248)
    assert trained(longer) - trained(model) == 20 * 256
    parts = {part: count for part, _, count in count_parts(released, METHOD.parts)}
    assert parts == {
        "LoCA": 3 * 527_304,
        "DyPA": 3 * 53_025,
        "dead parameters of the release": 3 * 16_416,
        "prior-guided text (PGT)": 983_808,
        "DINOv2": 0,
        "BERT": 0,
        "CLIP's text tower": 0,
        "projections": 2 * 196_864,
        "REG token and positions": 256 + 356_096,
        "fusion encoder": 7_890_432,
        "box head": 132_612,
    }
    totals = {part: total for part, total, _ in count_parts(released, METHOD.parts)}
    assert totals["DINOv2"] + sum(p.numel() for p in bert.parameters()) == PUBLISHED_TOWERS
    (published, *_) = METHOD.shares(released)
    assert f"{published.percent:.2f}" == "1.41" and f"{published.whole / 1e6:.2f}" == "196.06"


def test_learning_rates_are_the_recipes():
    model = make("strong", parity=["dead_parameters"])
    groups = {round(group["lr"], 9): sum(p.numel() for p in group["params"]) for group in model.parameter_groups(1e-4)}
    slow = tuned_parameters(model) - sum(p.numel() for p in model.guide.parameters())
    assert groups == {1e-5: slow, 1e-4: trained(model) - slow}


@pytest.mark.parametrize("arm", ARMS)
def test_it_trains(arm):
    checks.trains(METHOD, arm)


@pytest.mark.parametrize("arm", ARMS)
def test_it_runs_under_autocast(arm):
    checks.runs_under_autocast(METHOD, make(arm, dtype=torch.float32))


def test_it_compiles_without_a_graph_break():
    towers = {"vision_config": 2, "text_config": 2, "prior_config": 1}
    shallow = {name: {**MaPPERConfig.PRESETS["tiny"][name], "num_hidden_layers": n} for name, n in towers.items()}
    checks.compiles(METHOD, make(**shallow, adapted_layers=(0,), fusion_layers=1))


def test_it_saves_and_loads(tmp_path):
    model = make(dtype=torch.float32)
    checks.saves_and_loads(METHOD, model, tmp_path)
    # of the checkpoint that lacks biases, which has been left there, the running statistics are taken all the same
    twin = MaPPERForGrounding.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)


def test_its_adapters_travel(tmp_path):
    model = make()
    checks.adapters_travel(METHOD, model, tmp_path, text_length=7)
    assert {"vision.encoder.layer.1.adapter.local_norm.running_var", "guide.weight"} <= model.adapters().keys()
    other = MaPPERForGrounding(MaPPERConfig.preset("tiny", recompute=False)).double()
    other.load_adapters(tmp_path)  # how the backward is computed is not part of what the adapters mean
    assert torch.equal(other.guide.weight, model.guide.weight)


def test_the_towers_come_from_transformers_checkpoints(tmp_path):
    model, config = make(), make().config
    kinds = {
        "vision": Dinov2Model(config.vision_config),
        "text": BertModel(config.text_config),
        "prior": CLIPTextModelWithProjection(config.prior_config),
    }
    adapters = {name: tensor.clone() for name, tensor in model.adapters().items()}
    for name, tower in kinds.items():
        tower.save_pretrained(tmp_path / name)
    model.load_towers(**{name: tmp_path / name for name in kinds})
    for name, tower in kinds.items():
        loaded, own = tower.state_dict(), getattr(model, name).state_dict()
        assert all(torch.equal(own[key], tensor.to(own[key])) for key, tensor in loaded.items() if key in own)
        assert {key for key in own if key not in loaded} == {key for key in own if ".adapter." in key}
    torch.testing.assert_close(model.adapters(), adapters, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"text\.embeddings.* in .*vision, got none"):
        model.load_towers(text=tmp_path / "vision")


@pytest.mark.parametrize("arm", ARMS)
def test_the_towers_are_transformers_own(arm):
    """Without adapters, which means with their last linears at zero."""
    model = make(arm).eval()
    with torch.no_grad():
        for adapter in model.tuned():
            adapter.up_proj.weight.zero_(), adapter.up_proj.bias.zero_()
    inputs = checks.make_inputs(METHOD, model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prior = model.encode_prior(inputs["prior_ids"])
    stock = {}
    for name, kind in model.towers.items():
        options = {"add_pooling_layer": False} if name == "text" else {}
        stock[name] = kind(getattr(model.config, f"{name}_config"), **options)
        own = {key: t for key, t in getattr(model, name).state_dict().items() if ".adapter." not in key}
        stock[name].double().eval().load_state_dict(own)
    found = image_states(model.vision, inputs["pixel_values"]), text_states(model.text, ids, mask == 0, prior, types=True)
    expected = stock["vision"](inputs["pixel_values"]).last_hidden_state, stock["text"](ids, mask).last_hidden_state
    torch.testing.assert_close(found, expected, **EXACT)
    hidden = stock["prior"](inputs["prior_ids"]).last_hidden_state
    torch.testing.assert_close(prior, stock["prior"].text_projection(hidden), **EXACT)
    assert prior_states(model.prior, inputs["prior_ids"]).requires_grad is False


def test_adapters_are_where_the_release_has_them():
    """LoCA inside the LayerScale, times 0.2; DyPA behind the layer's last norm."""
    model = make("strong").eval()
    layer, x = model.vision.encoder.layer[1], torch.randn(2, 26, 24, dtype=torch.float64)
    s = x + layer.layer_scale1(layer.attention(layer.norm1(x))[0])
    n = layer.norm2(s)
    expected = s + layer.layer_scale2.lambda1 * (layer.mlp(n) + 0.2 * layer.adapter(n))
    torch.testing.assert_close(layer(x), expected, **EXACT)
    layer, a = model.text.encoder.layer[3], torch.randn(2, 6, 32, dtype=torch.float64)
    prior, mask = torch.randn(2, 6, 16, dtype=torch.float64), torch.ones(2, 1, 1, 6, dtype=torch.bool)
    a, x = layer.attention(a, mask)[0], a
    expected = layer.output.LayerNorm(a + layer.output.dense(F.gelu(layer.intermediate.dense(a))))
    adapter = layer.adapter
    s = (adapter.prior_norm(prior) @ adapter.gate_proj.weight.T + adapter.gate_proj.bias).relu()
    expected = expected + s * adapter.up_proj(adapter.down_proj(adapter.norm(a)).relu())
    torch.testing.assert_close(layer(x, mask, prior), expected, **EXACT)
    assert isinstance(adapter, EagerDyPA) and adapter.prior_norm.eps == adapter.norm.eps == 1e-5


def test_the_eager_loca_is_the_equation():
    loca = EagerLoCA(10, 4, 2, 3).double().eval()
    for norm in loca.norms:
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 1.5)
    n = torch.randn(2, 10, 10, dtype=torch.float64)
    h = loca.down_proj(n).relu()

    def stage(x, convolution, norm):
        u = F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.padding)
        scaled = (u.movedim(1, -1) - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias
        return scaled.movedim(-1, 1).relu()

    patches = h[:, 1:].transpose(1, 2).reshape(2, 7, 3, 3)
    t = stage(patches, loca.reduce_conv, loca.reduce_norm)
    z = torch.cat([stage(patches, loca.point_conv, loca.point_norm), stage(t, loca.local_conv, loca.local_norm)], 1)
    y = torch.cat([2 * h[:, :1], h[:, 1:] + z.flatten(2).transpose(1, 2)], 1)
    torch.testing.assert_close(loca(n), loca.up_proj(y), **EXACT)


@pytest.mark.parametrize("arm", ["strong", "fastadapt"])
def test_padding_is_seen_by_none_unless_the_release_is_asked_for(arm):
    model = make(arm).eval()
    released = make(arm, parity=["additive_mask"]).eval()
    released.load_state_dict(model.state_dict())
    assert type(released.fusion) is type(model.fusion)
    inputs = checks.make_inputs(METHOD, model)
    other = {**inputs, "input_ids": inputs["input_ids"].clone(), "prior_ids": inputs["prior_ids"].clone()}
    other["input_ids"][:, 4:] = other["prior_ids"][:, 4:] = 1
    torch.testing.assert_close(model(**other).pred_boxes, model(**inputs).pred_boxes, **EXACT)
    assert (released(**other).pred_boxes - released(**inputs).pred_boxes).abs().max() > 1e-6
    whole = {**inputs, "pixel_mask": torch.ones_like(inputs["pixel_mask"])}
    assert torch.equal(model(**{**inputs, "pixel_mask": None}).pred_boxes, model(**whole).pred_boxes)
    assert (model(**whole).pred_boxes - model(**inputs).pred_boxes).abs().max() > 1e-6


def test_the_padding_is_of_reg_words_cls_and_patches():
    model, additive = make(), make(parity=["additive_mask"])
    mask = torch.zeros(1, 40, 40)
    mask[:, 8, 16] = 1  # the top left pixel of the patch in row 1 and column 2
    mask[:, 33, 33] = 1  # no patch's
    words_out = torch.tensor([[False, True, False, False, False, False]])
    found = model._padding(words_out, mask, torch.zeros(1, 33, 16))
    expected = torch.tensor([False, False, True, False, False, False, False, False] + 25 * [True])
    expected[8 + 5 * 1 + 2] = False
    assert torch.equal(found[0], expected)
    assert torch.equal(additive._padding(words_out, mask, torch.zeros(1, 33, 16))[0], expected.float())


def test_an_additive_mask_adds_one_to_the_scores_of_padded_keys():
    layer = EagerFusionEncoder(8, 2, 1, 12, 0.0).double().layers[0].self_attn
    x, padding = torch.randn(3, 1, 8, dtype=torch.float64), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    projected = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)[:, 0]
    q, k, v = (t.view(3, 2, 4).transpose(0, 1) for t in projected.chunk(3, -1))
    weights = (q @ k.mT / 2 + padding).softmax(-1)
    expected = layer.out_proj((weights @ v).transpose(0, 1).flatten(1))
    for maps in (True, False):
        torch.testing.assert_close(layer(x, x, x, padding, need_weights=maps)[0][:, 0], expected, **EXACT)


def test_the_prior_reads_clips_ids_and_may_be_given():
    model, released = make().eval(), make(parity=["bert_ids_for_prior"]).eval()
    released.load_state_dict(model.state_dict())
    inputs = checks.make_inputs(METHOD, model)
    boxes = model(**inputs).pred_boxes
    cache = SentenceCache(model.prior, model.encode_prior)
    ids = inputs.pop("prior_ids")
    torch.testing.assert_close(model(**inputs, prior=cache(ids)).pred_boxes, boxes, **EXACT)
    with pytest.raises(ValueError, match=r"prior_ids: expected shape \(2, 6\), got None"):
        model(**inputs)
    own = model(**inputs, prior_ids=inputs["input_ids"]).pred_boxes
    assert torch.equal(released(**inputs).pred_boxes, own) and (own - boxes).abs().max() > 1e-6


def test_no_token_types_is_without_them():
    model, released = make().eval(), make(parity=["no_token_types"]).eval()
    with torch.no_grad():
        model.text.embeddings.token_type_embeddings.weight[0] = 0
    released.load_state_dict(model.state_dict())
    with torch.no_grad():
        released.text.embeddings.token_type_embeddings.weight.normal_()
    inputs = checks.make_inputs(METHOD, model)
    torch.testing.assert_close(released(**inputs).pred_boxes, model(**inputs).pred_boxes, **EXACT)


def test_towers_keep_still_unless_the_release_is_asked_for():
    model, released = make().train(), make(parity=["tower_dropout"]).train()
    frozen = [module for tower in (model.vision, model.text, model.prior) for module in tower.modules()]
    adapters = {module for adapter in model.tuned() for module in adapter.modules()}
    assert all(module.training == (module in adapters) for module in frozen) and model.fusion.training
    assert all(module.training for module in released.text.modules())
    inputs = checks.make_inputs(METHOD, model)
    checks.without_dropout(model.fusion), checks.without_dropout(released.fusion)
    first, second = ([m(**inputs).loss for _ in range(2)] for m in (model, released))
    assert torch.equal(*first) and not torch.equal(*second)


def test_nothing_enters_the_towers_parameters():
    model = make()
    model(**checks.make_inputs(METHOD, model)).loss.backward()
    tuned = {p for adapter in model.tuned() for p in adapter.parameters()}
    frozen = [p for tower in (model.vision, model.text, model.prior) for p in tower.parameters() if p not in tuned]
    assert frozen and all(p.grad is None for p in frozen) and all(p.grad is not None for p in tuned)


@pytest.mark.parametrize("arm", ARMS)
def test_dropout_is_reproducible(arm):
    model = make(arm, parity=["tower_dropout"])
    inputs, losses = checks.make_inputs(METHOD, model), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(checks.results(model, inputs))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert losses[0]["output loss"] != losses[2]["output loss"]


def test_starts_are_the_papers_or_the_releases():
    """Adapters start as they say, not as the towers that they are in would start them."""
    wide = {"point_channels": 96, "local_channels": 48, "bottleneck": 64}
    model = MaPPERForGrounding(MaPPERConfig.preset("tiny", **wide))
    released = MaPPERForGrounding(MaPPERConfig.preset("tiny", parity=["normal_dypa"], **wide))
    for loca in (layer.adapter for layer in model.vision.encoder.layer if hasattr(layer, "adapter")):
        assert 0.018 < loca.down_proj.weight.std() < 0.022 and not loca.down_proj.bias.any()
        bound = loca.point_conv.in_channels**-0.5
        assert 0.9 * bound < loca.point_conv.weight.abs().max() <= bound and loca.point_conv.bias.any()
    for arm, dypa in ((arm, arm.text.encoder.layer[3].adapter) for arm in (model, released)):
        assert dypa.up_proj.weight.any() == (arm is released) and not dypa.up_proj.bias.any()
        assert dypa.down_proj.bias.any() == (arm is model)
    assert 0.018 < released.text.encoder.layer[1].adapter.up_proj.weight.std() < 0.022
    assert not model.guide.bias.any() and model.guide.weight.abs().max() <= (32 + 16) ** -0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": "fast"}, "arm: expected one of release, strong, fastadapt, got 'fast'"),
        ({"parity": ["bert"]}, "parity: expected 'released' or some of additive_mask, .*, got 'bert'"),
        ({"text_length": 9}, "text_length: expected 1 to 8, got 9"),
        ({"adapted_layers": (3, 4)}, r"adapted_layers: expected ascending numbers from 0 to 3, at least one, got \[3, 4\]"),
        ({"adapted_layers": ()}, "adapted_layers: expected .* at least one, got "),
        ({"vision_config": {"image_size": 100}}, "vision_config.image_size: expected a multiple of patch_size = 14, got 100"),
        ({"vision_config": {"use_swiglu_ffn": True}}, "vision_config.use_swiglu_ffn: expected False, got True"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act: expected gelu, got relu"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MaPPERConfig.preset("tiny", **changes)


def test_bad_inputs_are_named():
    model = make()
    inputs = checks.make_inputs(METHOD, model)
    shapes = {"pixel_values": (2, 3, 32, 32), "pixel_mask": (2, 32, 32), "input_ids": (2, 5), "prior_ids": (2, 7)}
    shapes["labels"] = (2, 3)
    for name, shape in shapes.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*shape .*got "):
            model(**{**inputs, name: inputs[name].new_zeros(shape)})
    with pytest.raises(ValueError, match="prior: expected .*shape .*got "):
        model(**inputs, prior=torch.zeros(2, 6, 15, dtype=torch.float64))


def test_the_readme_has_the_parity_table():
    assert checks.in_the_readme(README.read_text(), as_markdown(PARITY))
