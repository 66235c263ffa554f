"""HiLoRA in HiVG: what each stage trains, that going on and merging change nothing, and its way to PEFT."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPModel

from fastadapt import SentenceCache
from fastadapt.models.common.arms import ARMS
from fastadapt.models.common.table import trained
from fastadapt.models.hivg import HiVGForGrounding
from fastadapt.models.hivg.method import METHOD
from fastadapt.models.hivg.towers import image_states
from tests.models import checks
from tests.tolerance import EXACT


def make(arm: str = "fastadapt", **changes) -> HiVGForGrounding:
    return checks.make(METHOD, arm=arm, **changes)


@pytest.mark.parametrize("parity", [(), ("single_pair",)])
def test_stages_train_more_and_more_and_change_nothing(parity):
    model = make(stage=0, parity=parity).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B") and ".pairs.0." not in name:
            torch.nn.init.zeros_(parameter)  # as a stage starts
    inputs, pairs = checks.make_inputs(METHOD, model), []
    for stage in range(3):
        if stage:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            loss = model(**inputs).loss
            model.advance_stage()
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            torch.testing.assert_close(model(**inputs).loss, loss, **EXACT)
        tuned = {name for name, p in model.named_parameters() if p.requires_grad and ".pairs." in name}
        fresh = make(stage=stage, parity=parity)
        assert tuned == {name for name, p in fresh.named_parameters() if p.requires_grad and ".pairs." in name}
        pairs.append({name.split(".")[1] + name.split(".layers.")[1].split(".")[0] for name in tuned})
        number = "0" if parity else str(stage)
        assert all(f".pairs.{number}." in name for name in tuned)
        modules = [pair for _, _, linear in model.train().lora_linears() for pair in linear.pairs.values()]
        assert modules and all(pair.training == pair.trains for pair in modules)
        model.eval()
    text = {f"text_model{i}" for i in range(3)}
    assert pairs == [set(), text | {"vision_model0", "vision_model1"}, text | {f"vision_model{i}" for i in range(3)}]
    assert model.config.stage == 2
    with pytest.raises(ValueError, match="stage: expected below the last, 2, got 2"):
        model.advance_stage()


def test_later_pairs_do_nothing_before_their_stage():
    model = make(stage=1).eval()
    inputs = checks.make_inputs(METHOD, model)
    loss = model(**inputs).loss
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pairs.2." in name:
                parameter.normal_()
    torch.testing.assert_close(model(**inputs).loss, loss, **EXACT)
    model.advance_stage()
    assert (model(**inputs).loss - loss).abs() > 1e-6


@pytest.mark.parametrize("arm", ARMS)
def test_a_merged_stage_computes_the_same(arm):
    model = make(arm).eval()
    inputs = checks.make_inputs(METHOD, model)
    loss, tuned = model(**inputs).loss, trained(model)
    model.merge_stage()
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("lora_B"))
    torch.testing.assert_close(model(**inputs).loss, loss, **EXACT)
    assert trained(model) == tuned


def test_frozen_pairs_drop_only_as_released():
    for parity, drops in (((), False), (("frozen_lora_dropout", "single_pair"), True)):
        model = checks.without_dropout(make(stage=0, parity=parity))
        for _, _, linear in model.lora_linears():
            for pair in linear.pairs.values():
                pair.dropout = 0.5
        inputs = checks.make_inputs(METHOD, model)
        assert torch.equal(model(**inputs).loss, model(**inputs).loss) is not drops
        assert torch.equal(model.eval()(**inputs).loss, model(**inputs).loss)


def test_peft_loads_what_is_exported(tmp_path):
    peft = pytest.importorskip("peft")
    model = make(bridged_blocks=()).eval()
    inputs = checks.make_inputs(METHOD, model)
    assert model.save_peft(tmp_path) == tmp_path
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    clip = CLIPModel(model.clip.config).double()
    clip.load_state_dict({name: t for name, t in model.clip.state_dict().items() if ".pairs." not in name})
    ids, images = inputs["input_ids"], inputs["pixel_values"]

    def states() -> list[torch.Tensor]:
        return [clip.text_model(ids).last_hidden_state, clip.vision_model(images).last_hidden_state]

    expected = [model.encode_text(ids)[0], image_states(model.clip.vision_model, images, {})[-1]]
    apart = [(ours - alone).abs().max() for ours, alone in zip(expected, states())]
    assert min(apart) > 1e-3
    adapted = peft.PeftModel.from_pretrained(clip, tmp_path).eval()
    torch.testing.assert_close(states(), expected, **EXACT)
    ranks = {layer.r["default"] for layer in adapted.modules() if isinstance(layer, peft.tuners.lora.Linear)}
    assert ranks == {4, 8}  # of one pair and of two


def test_sentences_can_be_kept_while_the_text_tower_is_frozen():
    model = make(stage=0)
    checks.without_dropout(model)
    inputs = checks.make_inputs(METHOD, model)
    loss = model(**inputs).loss
    model.encode_text = SentenceCache(model.clip.text_model, model.encode_text)
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).loss, loss, **EXACT)
    assert (model.encode_text.misses, model.encode_text.hits) == (2, 2)


def test_adapters_have_the_pairs_of_all_stages():
    model = make()
    frozen = {name for name, p in model.named_parameters() if ".pairs.1." in name and not p.requires_grad}
    assert frozen and frozen <= model.adapters().keys()
