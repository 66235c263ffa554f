"""HiVG: its three arms against each other and its parts against their equations, and its way through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

import fastadapt
from fastadapt import trim_padding
from fastadapt.models.common.arms import ARMS
from fastadapt.models.common.parity import as_markdown
from fastadapt.models.hivg import HiVGConfig, HiVGForGrounding
from fastadapt.models.hivg.configuration import PARITY
from fastadapt.models.hivg.losses import WEIGHTS, box_masks
from fastadapt.models.hivg.method import METHOD
from fastadapt.models.hivg.towers import image_states, text_states
from fastadapt.prove.saved import saved_bytes
from tests.models import checks
from tests.tolerance import EXACT, error

README = Path(fastadapt.__file__).parent / "models" / "hivg" / "README.md"
QUIRKS = ["raw_text_states", "padding_words", "single_pair", "frozen_lora_dropout"]


def make(arm: str = "fastadapt", **changes) -> HiVGForGrounding:
    return checks.make(METHOD, arm=arm, **changes)


@pytest.mark.parametrize("changes", [{}, {"parity": QUIRKS}, {"parity": ["mixed_batch"]}, {"parity": "released"}])
def test_the_arms_agree_in_float64(changes):
    model = make("release", **changes)
    dead = [name for name, _ in model.named_parameters() if name.startswith("dead.")]
    assert len(dead) == (6 if changes.get("parity") == "released" else 0)
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model, 3), checks.same_in_double, dead)


@pytest.mark.parametrize("changes", [{"mixup": True, "text_layers": ()}, {"bridged_blocks": ()}])
def test_the_arms_agree_in_other_forms(changes):
    model = make("release", **changes)
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_double)


def test_recomputing_changes_nothing_but_memory():
    model = checks.without_dropout(make())
    inputs = checks.make_inputs(METHOD, model)
    expected = checks.results(model, inputs)
    twin = HiVGForGrounding(HiVGConfig.preset("tiny", recompute=True)).double()
    twin.load_state_dict(model.state_dict())
    assert twin.config.fingerprint() == model.config.fingerprint()
    checks.same_in_double(checks.results(checks.without_dropout(twin.train()), inputs), expected)
    kept = [saved_bytes(lambda: m(**inputs).loss, [*m.parameters(), *m.buffers()]) for m in (twin, model)]
    assert kept[0] < 0.75 * kept[1]


def test_the_arms_agree_in_float32_at_the_published_size():
    """Every width as published, with a third of the depth, on a smaller image."""
    towers = {
        "vision_config": {"patch_size": 16, "num_hidden_layers": 4, "image_size": 112},
        "text_config": {"num_hidden_layers": 2, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999},
    }
    depth = {"bridged_blocks": (0, 3), "visual_levels": (1, 2, 3, 4), "stage_blocks": (0, 2, 3, 4), "text_layers": (2,)}
    model = make("release", preset="base-refcoco-stage3", dtype=torch.float32, fusion_layers=2, **towers, **depth)
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_single)


@pytest.mark.parametrize("arm", ARMS)
def test_autocast_is_close(arm):
    model = checks.without_dropout(make(arm, dtype=torch.float32))
    inputs = checks.make_inputs(METHOD, model)
    exact = checks.results(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        lower = checks.results(model, inputs)
    assert lower.keys() == exact.keys() and lower["output loss"].dtype == torch.float32
    assert abs(lower["output loss"] / exact["output loss"] - 1) < 0.02
    assert error(torch.cat([lower[n].flatten() for n in exact]), torch.cat([t.flatten() for t in exact.values()])) < 0.1


def test_samples_keep_to_themselves_unless_the_release_is_asked_for():
    for parity, mixes in (((), False), (("mixed_batch",), True)):
        model = make(parity=parity).eval()
        inputs = checks.make_inputs(METHOD, model, 3)
        boxes = model(**inputs).pred_boxes
        inputs["input_ids"][2, :3] = torch.tensor([5, 6, 7])
        moved = (model(**inputs).pred_boxes - boxes).abs().amax(1)
        assert moved[2] > 1e-8 and (moved[:2].max() > 1e-8) == mixes
        if not mixes:
            alone = model(**{name: tensor[:1] for name, tensor in inputs.items()}).pred_boxes
            torch.testing.assert_close(alone, boxes[:1], **EXACT)


def test_padding_is_seen_by_none_and_can_be_cut():
    model = make().eval()
    inputs = checks.make_inputs(METHOD, model)
    output = model(**inputs)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 6:] = 1
    torch.testing.assert_close(model(**other).pred_boxes, output.pred_boxes, **EXACT)
    assert torch.equal(model(**{**inputs, "attention_mask": None}).loss, output.loss)
    padding, ids = trim_padding(inputs["attention_mask"] == 0, inputs["input_ids"], multiple=1)
    assert ids.shape == (2, 6)
    torch.testing.assert_close(model(**{**inputs, "input_ids": ids, "attention_mask": ~padding}).loss, output.loss, **EXACT)
    released = make(parity=["padding_words"]).eval()
    assert (released(**other).pred_boxes - released(**inputs).pred_boxes).abs().max() > 1e-8
    whole = {**inputs, "pixel_mask": torch.ones_like(inputs["pixel_mask"])}
    assert torch.equal(model(**{**inputs, "pixel_mask": None}).loss, model(**whole).loss)
    assert (model(**whole).pred_boxes - output.pred_boxes).abs().max() > 1e-8


def test_places_are_padding_from_half_on():
    mask = torch.zeros(1, 32, 32)
    mask[0, :12, :5] = 1  # all of the first place's middle, and half of that of the place below
    padding = make()._image_padding(mask, 1, torch.zeros(1, 1, dtype=torch.bool))[0]
    assert (~padding).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("arm", ARMS)
def test_the_towers_are_transformers_clip(arm):
    model = make(arm, stage=0, bridged_blocks=()).eval()
    clip = CLIPModel(model.clip.config).double()
    clip.load_state_dict({name: t for name, t in model.clip.state_dict().items() if ".pairs." not in name})
    inputs = checks.make_inputs(METHOD, model)
    for module, argument, states in (
        (clip.text_model, inputs["input_ids"], text_states(model.clip.text_model, inputs["input_ids"])),
        (clip.vision_model, inputs["pixel_values"], image_states(model.clip.vision_model, inputs["pixel_values"], {})),
    ):
        hidden = module(argument, output_hidden_states=True).hidden_states
        tolerance = dict(rtol=1e-5, atol=1e-5) if arm == "release" else EXACT  # its softmax there is in float32
        torch.testing.assert_close(states, list(hidden), **tolerance)
    output = clip(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    ours = model(**inputs)
    torch.testing.assert_close((ours.text_embeds, ours.image_embeds), (output.text_embeds, output.image_embeds), **tolerance)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    model = make().eval()
    inputs = checks.make_inputs(METHOD, model)
    output = model(**inputs)
    boxes, labels = output.pred_boxes, inputs["labels"]
    torch.testing.assert_close(output.losses["l1"], (boxes - labels).abs().sum() / 2, **EXACT)
    logits = model.clip.logit_scale.exp() * output.text_embeds @ output.image_embeds.T
    own = torch.arange(2)
    contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(output.losses["clc"], contrast, **EXACT)
    assert output.loss == sum(WEIGHTS[name] * value for name, value in output.losses.items())
    assert output.losses.keys() == WEIGHTS.keys() and (WEIGHTS["rtcc_focal"], WEIGHTS["mask_dice"]) == (20, 2)
    masks = box_masks(labels, 32)
    explicit = model(**inputs, mask_labels=masks[:, 0].long())
    assert torch.equal(explicit.loss, output.loss)
    other = model(**inputs, mask_labels=torch.zeros(2, 32, 32))
    changed = {name for name, value in other.losses.items() if not torch.equal(value, output.losses[name])}
    assert changed == {"mask_focal", "mask_dice"}


def test_box_masks_are_the_pixels_inside():
    masks = box_masks(torch.tensor([[0.5, 0.25, 0.5, 0.5]]), 4)
    assert masks[0, 0].tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_without_boxes_the_box_is_all():
    model = make().eval()
    inputs = checks.make_inputs(METHOD, model)
    full = model(**inputs)
    labels = inputs.pop("labels")
    output = model(**inputs)
    assert list(output) == ["pred_boxes"]
    torch.testing.assert_close(output.pred_boxes, full.pred_boxes, **EXACT)
    released = make(parity=["auxiliary_heads_at_test"]).eval()
    expected = {"pred_boxes", "token_similarity", "mask_logits", "text_embeds", "image_embeds"}
    assert set(released(**inputs)) == expected and set(released(**inputs, labels=labels)) == expected | {"loss", "losses"}


@pytest.mark.parametrize("arm", ARMS)
def test_it_trains(arm):
    checks.trains(METHOD, arm)


@pytest.mark.parametrize("arm, recompute", [*((arm, False) for arm in ARMS), ("fastadapt", True)])
def test_dropout_is_reproducible(arm, recompute):
    model = make(arm, recompute=recompute)
    inputs, losses = checks.make_inputs(METHOD, model), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(checks.results(model, inputs))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert losses[0]["output loss"] != losses[2]["output loss"]


def test_it_compiles_without_a_graph_break():
    tiny = METHOD.config.PRESETS["tiny"]
    shallow = {
        "vision_config": {**tiny["vision_config"], "num_hidden_layers": 2},
        "text_config": {**tiny["text_config"], "num_hidden_layers": 1},
    }
    blocks = {"text_layers": (1,), "bridged_blocks": (0,), "visual_levels": (1, 2), "stage_blocks": (0, 1, 2)}
    checks.compiles(METHOD, make(**shallow, **blocks, fusion_layers=1))


def test_it_saves_and_loads(tmp_path):
    checks.saves_and_loads(METHOD, make(dtype=torch.float32), tmp_path)


def test_its_adapters_travel(tmp_path):
    checks.adapters_travel(METHOD, make(), tmp_path, stage=1)


def test_clip_comes_from_a_transformers_checkpoint(tmp_path):
    model = make(dtype=torch.float32)
    clip = CLIPModel(model.clip.config)
    clip.save_pretrained(tmp_path)
    model.load_towers(clip=tmp_path)
    loaded, own = clip.state_dict(), model.clip.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in loaded.items())
    assert own.keys() - loaded.keys() and all(".pairs." in name for name in own.keys() - loaded.keys())
    assert torch.equal(model.levels_projection.weight, clip.visual_projection.weight.repeat(1, 3))


def test_starts_are_the_releases():
    with torch.device("cpu"):
        model = HiVGForGrounding(HiVGConfig.preset("tiny"))
        quiet = HiVGForGrounding(HiVGConfig.preset("tiny", bridge_zero_init=True))
    assert torch.equal(model.levels_projection.weight, model.clip.visual_projection.weight.repeat(1, 3))
    assert 0.9 < model.bridges.token_weight.std() < 1.1 and 0.7 < model.reg.weight.std() < 1.4
    bound = (model.bridges.gate_weight.shape[1]) ** -0.5
    assert 0.95 * bound < model.bridges.gate_weight.abs().max() <= bound
    for _, _, linear in model.lora_linears():
        assert all(pair.lora_A.any() and not pair.lora_B.any() for pair in linear.pairs.values())
    assert not any(side.fc2.weight.any() for side in quiet.bridges.visual) and model.bridges.visual[0].fc2.weight.any()


def test_the_fused_arm_runs_frozen_blocks():
    model = make()
    rows = fastadapt.explain(model.clip).blocks
    assert len(rows) == 4 + 3 - 2 and all(row.path.startswith("fastadapt") for row in rows)
    inputs = checks.make_inputs(METHOD, model)
    checks.without_dropout(model)
    loss = model(**inputs).loss
    model.clip.vision_model.encoder.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(**inputs).loss, loss, **EXACT)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": 3}, "stage: expected 0 to 2, got 3"),
        ({"stage_blocks": (0, 5)}, r"stage_blocks: expected ascending numbers from 0 to 4, got \[0, 5\]"),
        ({"stage_blocks": (1, 2, 3)}, "stage_blocks: expected 0 blocks at stage 0"),
        ({"text_layers": ()}, "text_layers: expected at least one layer"),
        ({"mixup": True}, "text_layers: expected none with mixup"),
        ({"bridged_blocks": (0, 4)}, "bridged_blocks: expected ascending numbers from 0 to 3"),
        ({"text_length": 9}, "text_length: expected 1 to 8, got 9"),
        ({"fusion_width": 32}, "vision_config.projection_dim: expected fusion_width = 32, got 16"),
        ({"parity": ["bridge"]}, "parity: expected 'released' or some of mixed_batch, .*, got 'bridge'"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        HiVGConfig.preset("tiny", **changes)


def test_bad_inputs_are_named():
    model = make()
    inputs = checks.make_inputs(METHOD, model)
    for name, shape in {"pixel_values": (2, 3, 64, 64), "input_ids": (2, 9), "labels": (2, 3)}.items():
        wrong = inputs[name].new_zeros(shape)
        with pytest.raises(ValueError, match=f"{name}: expected .*shape .*got "):
            model(**{**inputs, name: wrong})
    with pytest.raises(ValueError, match="input_ids: expected shape .*, got None"):
        model(**{**inputs, "input_ids": None})


def test_the_readme_has_the_parity_table():
    assert checks.in_the_readme(README.read_text(), as_markdown(PARITY))
