"""ETRIS: its three arms against each other and its parts against their equations, its counts, and its way through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastadapt
from fastadapt.models.common.arms import ARMS
from fastadapt.models.common.parity import as_markdown
from fastadapt.models.common.table import count_parts, trained
from fastadapt.models.etris import ETRISConfig, ETRISForSegmentation
from fastadapt.models.etris.configuration import PARITY
from fastadapt.models.etris.method import METHOD
from tests.models import checks
from tests.tolerance import EXACT, error

README = Path(fastadapt.__file__).parent / "models" / "etris" / "README.md"
TINY = "tiny", "tiny-resnet"


def make(arm: str = "fastadapt", preset: str = "tiny", **changes) -> ETRISForSegmentation:
    return checks.make(METHOD, preset, arm=arm, **changes)


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("mask_padding", [False, True])
def test_the_arms_agree_in_float64(preset, mask_padding):
    model = make("release", preset, mask_padding=mask_padding)
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_double)


@pytest.mark.parametrize("preset", TINY)
def test_the_arms_agree_in_float64_as_released(preset):
    """The release runs its gates' queries and keys, whose gradient is exactly zero; the others leave them out."""
    model = make("strong", preset, parity="released")
    dead = {name for name, _ in model.named_parameters() if name.startswith("neck.dead.")}

    def same(found, expected):
        assert all(not found[name].any() for name in dead & found.keys())
        checks.same_in_double({name: value for name, value in found.items() if name not in dead}, expected)

    assert len(dead) == 12
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), same, dead)
    release = checks.results(checks.in_arm(model, "release"), checks.make_inputs(METHOD, model))
    assert dead < release.keys()


def at_64_pixels(preset: str, **of_vision) -> ETRISForSegmentation:
    """As it starts, on the smallest image that leaves the batch norms something to average."""
    vision = {**ETRISConfig.preset(preset).vision_config.to_dict(), **of_vision, "image_size": 64}
    return ETRISForSegmentation(ETRISConfig.preset(preset, arm="release", vision_config=vision)).train()


def test_the_arms_agree_in_float32_at_the_published_size():
    """Every width and depth as published."""
    model = at_64_pixels("vit-b")
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), checks.same_in_single)


def test_the_arms_agree_in_float32_with_the_published_resnet():
    """One block a stage.  A rounding takes some ReLUs over their kink, and eight values of a map are normalised together: the
    release's own gradients are 2e-3 from float64's."""

    def same(found, expected):
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            assert error(found[name], want) < (2e-5 if " " in name else 2e-2), name

    model = at_64_pixels("r50", layers=(1, 1, 1, 1))
    checks.arms_agree(METHOD, model, checks.make_inputs(METHOD, model), same)


COUNTS = {  # image tower and its positions, text tower, Bridger, HA, GA, Projector, trained, all
    "vit-b": (86_561_280, 519_936, 63_428_097, 598_592, 9_983_488, 7_899_136, 4_788_737, 23.83, 173.3),
    "vit-b-ladder128": (86_561_280, 519_936, 63_428_097, 1_387_648, 9_983_488, 7_899_136, 4_788_737, 24.62, 174.0),
    "r50": (40_416_096, 102_400, 63_690_241, 1_942_080, 12_867_072, 7_899_136, 5_968_897, 28.82, 132.8),
    "r101": (57_309_536, 102_400, 63_428_097, 1_942_080, 11_556_352, 7_899_136, 4_788_737, 26.33, 146.9),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameters_are_the_published_ones(preset):
    with torch.device("meta"):
        released = ETRISForSegmentation(ETRISConfig.preset(preset, parity="released"))
        model = ETRISForSegmentation(ETRISConfig.preset(preset))
    rows = {part: (total, count) for part, total, count in count_parts(released, METHOD.parts)}

    def sum_of(*words):
        return sum(total for part, (total, _) in rows.items() if any(word in part for word in words))

    assert rows["position embeddings, text"] == (39_424, 39_424)
    image = sum_of("image", "shortcut"), sum_of("embeddings, image")
    assert (*image, sum_of("text"), *(sum_of(part) for part in ("Bridger", "HA", "GA", "Projector"))) == COUNTS[preset][:7]
    every = sum(p.numel() for p in released.parameters())
    assert (round(trained(released) / 1e6, 2), round(every / 1e6, 1)) == COUNTS[preset][7:]
    effective = trained(released) - 39_424 - image[1] - rows["HA, the gates' dead queries and keys"][1]
    assert sum_of("dead") == 1_575_936
    assert trained(model) == effective + rows.get("the attention pool's shortcut", (0, 0))[0]


def test_the_papers_percentages_are_of_the_image_tower():
    with torch.device("meta"):
        models = {name: ETRISForSegmentation(ETRISConfig.preset(name)) for name in ("vit-b-ladder128", "r101")}
    found = {name: METHOD.shares(model)[0] for name, model in models.items()}
    assert found["vit-b-ladder128"].whole == 86_192_640
    assert {name: f"{share.percent:.2f}" for name, share in found.items()} == {"vit-b-ladder128": "1.61", "r101": "3.39"}


@pytest.mark.parametrize("name", ["vit-b-refcocog", "r101-ladder128", "r50-ladder128-refcocog"])
def test_presets_are_made_of_a_tower_a_ladder_and_a_data_set(name):
    config = ETRISConfig.preset(name)
    assert config.image_size == 416 and config.grid == 26
    assert config.text_length == (22 if "refcocog" in name else 17)
    assert config.ladder_dim == (128 if "ladder128" in name else 64)
    assert (config.interaction, config.bridge_heads) == (("light", 8) if name[0] == "v" else ("full", 4))


@pytest.mark.parametrize("arm", ARMS)
def test_it_trains(arm):
    checks.trains(METHOD, arm)


@pytest.mark.parametrize("arm, preset", [*((arm, "tiny") for arm in ARMS), ("fastadapt", "tiny-resnet")])
def test_it_runs_under_autocast(arm, preset):
    checks.runs_under_autocast(METHOD, make(arm, preset, dtype=torch.float32))


def test_it_is_traced_without_a_graph_break():
    model = make(decoder_layers=1).eval()
    inputs = checks.make_inputs(METHOD, model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **EXACT)


@pytest.mark.parametrize("preset", TINY)
def test_it_saves_and_loads(preset, tmp_path):
    checks.saves_and_loads(METHOD, make(preset=preset, dtype=torch.float32), tmp_path)


def test_its_adapters_travel(tmp_path):
    checks.adapters_travel(METHOD, make(), tmp_path, text_length=7)


@pytest.mark.parametrize("parity", [(), "released"])
def test_adapters_have_all_that_no_checkpoint_of_the_resnet_has(parity, tmp_path):
    model = make(preset="tiny-resnet", parity=parity)
    model(**checks.make_inputs(METHOD, model))  # statistics drift where the release lets them
    names = model.adapters().keys()
    assert "vision.attnpool.connect.0.weight" in names and "vision.attnpool.connect.1.running_mean" in names
    assert ("vision.bn1.running_mean" in names) == bool(parity)
    assert ("vision.attnpool.positional_embedding" in names) == bool(parity)
    model.save_adapters(tmp_path)
    twin = make(preset="tiny-resnet", parity=parity, arm="strong")
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
    twin.load_state_dict(frozen, strict=False)
    twin.load_adapters(tmp_path)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_recomputed_towers_give_the_same():
    model = make()
    twin = make(recompute=True)
    twin.load_state_dict(model.state_dict())
    inputs = checks.make_inputs(METHOD, checks.without_dropout(model))
    expected = checks.results(model, inputs)
    checks.same_in_double(checks.results(checks.without_dropout(twin), inputs), expected)
    assert all(layer.recompute for layer in twin.vision.vision_model.encoder.layers)


def test_the_towers_blocks_are_frozen_blocks():
    model = make()
    model(**checks.make_inputs(METHOD, model))
    rows = fastadapt.explain(model).blocks
    assert len(rows) == 6 and all(row.path.startswith("fastadapt") for row in rows)


@pytest.mark.parametrize("preset", TINY)
def test_nothing_enters_the_towers_before_the_first_bridge(preset):
    model, released = make(preset=preset), make(preset=preset, parity=["trained_positions"])
    for each, enters in ((model, False), (released, True)):
        inputs = checks.make_inputs(METHOD, each)
        text = each.text.text_model.embeddings(inputs["input_ids"])
        image = each.vision.start(inputs["pixel_values"])
        assert text.requires_grad == enters and image.requires_grad == (enters and preset == "tiny")
        each(**inputs).loss.backward()
        frozen = [name for name, p in each.named_parameters() if p.grad is None]
        assert ("text.text_model.embeddings.position_embedding.weight" in frozen) == (not enters)


def test_towers_keep_still_unless_the_release_is_asked_for():
    model, released = make(preset="tiny-resnet"), make(preset="tiny-resnet", parity=["batch_statistics", "random_shortcut"])
    for each, drifts in ((model, False), (released, True)):
        before = each.vision.layer1[0].bn1.running_mean.clone()
        each.train()(**checks.make_inputs(METHOD, each))
        assert torch.equal(each.vision.layer1[0].bn1.running_mean, before) != drifts
        assert each.vision.attnpool.connect[1].training
        assert each.vision.attnpool.connect[0].weight.requires_grad != drifts
        each.eval()
        assert not any(module.training for module in each.modules())


@pytest.mark.parametrize("arm", ARMS)
def test_dropout_is_reproducible(arm):
    model = make(arm, "tiny-resnet")
    inputs, losses = checks.make_inputs(METHOD, model), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(checks.results(model, inputs))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert losses[0]["output loss"] != losses[2]["output loss"]


@pytest.mark.parametrize("preset", TINY)
def test_padding_words_are_seen_where_the_release_sees_them(preset):
    seen = []
    for mask_padding in (True, False):
        model = make(preset=preset, mask_padding=mask_padding).eval()
        inputs = checks.make_inputs(METHOD, model)
        assert (inputs["input_ids"][0] == 0).tolist() == [False] * 4 + [True] * 2
        logits = model(**inputs).logits
        assert torch.equal(model(**{**inputs, "attention_mask": None}).logits, logits)
        other = inputs["input_ids"].clone()
        other[:, 4:] = 1
        seen.append(not torch.allclose(model(**{**inputs, "input_ids": other}).logits, logits, **EXACT))
    assert seen == [False, True]


@pytest.mark.parametrize("preset", TINY)
def test_samples_do_not_see_one_another_in_eval(preset):
    model = make(preset=preset).eval()
    inputs = checks.make_inputs(METHOD, model, 3)
    whole = model(**inputs).logits
    alone = model(**{name: tensor[1:2] for name, tensor in inputs.items()}).logits
    torch.testing.assert_close(alone, whole[1:2], **EXACT)


def test_the_loss_is_binary_cross_entropy_with_a_quarter_of_the_mask():
    model = make().eval()
    inputs = checks.make_inputs(METHOD, model)
    output = model(**inputs)
    assert output.logits.shape == (2, 1, 16, 16)
    p, y = output.logits[:, 0].sigmoid(), inputs["labels"][:, ::4, ::4]  # the nearest neighbour at a quarter
    torch.testing.assert_close(output.loss, -(y * p.log() + (1 - y) * (1 - p).log()).mean(), **EXACT)
    boolean = {**inputs, "labels": inputs["labels"] > 0.5}
    assert torch.equal(model(**boolean).loss, output.loss)
    assert model(**{**inputs, "labels": None}).loss is None


def test_starts_are_the_releases():
    model = ETRISForSegmentation(ETRISConfig.preset("tiny", ladder_dim=64, bridge_heads=8)).requires_grad_(False)
    stage = model.bridger.stages[1]
    assert 0.018 < stage.text_in.weight.std() < 0.022 and not stage.text_in.bias.any()
    assert 0.018 < stage.interaction.attentions[0].out_proj.weight.std() < 0.022
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.9 * bound < stage.interaction.attentions[0].in_proj_weight.abs().max() <= bound
    assert stage.zoom.outward.weight.std() == pytest.approx((2 / 24) ** 0.5, rel=0.1)
    gate = model.neck.gates[0]
    assert 0.9 < gate.v_proj.weight.abs().max() / (6 / (4 * 32)) ** 0.5 <= 1 and not gate.out_proj.bias.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": "fast"}, "arm: expected one of release, strong, fastadapt, got 'fast'"),
        ({"parity": ["dead"]}, "parity: expected 'released' or some of trained_positions, .*, got 'dead'"),
        ({"bridge_blocks": (1, 2)}, "bridge_blocks: expected three ascending positive numbers, the last 3"),
        ({"bridge_blocks": (0, 2, 3)}, "bridge_blocks: expected three ascending positive numbers, the last 3"),
        ({"text_length": 9}, "text_length: expected 1 to 8, got 9"),
        ({"vision_config": {"image_size": 100, "patch_size": 16}}, "image_size: expected a multiple of 16, got 100"),
        ({"vision_config": {"model_type": "clip_resnet", "image_size": 48}}, "image_size: expected a multiple of 32, got 48"),
        ({"vision_config": {"model_type": "clip_resnet", "layers": (1, 2)}}, "layers: expected four positive numbers"),
        ({"vision_config": {"num_hidden_layers": 4}}, "num_hidden_layers: expected 3, as many as the text tower has, got 4"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ETRISConfig.preset("tiny", **changes)


def test_bad_inputs_are_named():
    model = make()
    inputs = checks.make_inputs(METHOD, model)
    for name, shape in {"pixel_values": (2, 3, 32, 32), "input_ids": (2, 5), "labels": (2, 16, 16)}.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*shape .*got "):
            model(**{**inputs, name: inputs[name].new_zeros(shape)})
    with pytest.raises(ValueError, match="input_ids: expected shape .*, got None"):
        model(**{**inputs, "input_ids": None})


def test_the_readme_has_the_parity_table():
    assert checks.in_the_readme(README.read_text(), as_markdown(PARITY))
