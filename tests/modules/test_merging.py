"""merged: a plain model inside the block, the very same weights after it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

import fastadapt
from bench.counters import counting
from fastadapt import LoraLinear, merged
from tests.tolerance import EXACT

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def own(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(LoraLinear(6, 8, r=2, lora_dropout=0.5, dtype=dtype), nn.ReLU(), LoraLinear(8, 3, r=2, dtype=dtype))


def pefts(dtype: torch.dtype) -> nn.Module:
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["0", "2"])
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).to(dtype)


MODELS = {"own": own, "PEFT": pefts, "fused PEFT": lambda dtype: fastadapt.fuse(pefts(dtype))}


def make(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = MODELS[kind](dtype).eval()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [model[0], model[2]]


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_the_same_and_weights_come_back_bit_for_bit(kind):
    for dtype in (torch.float64, torch.bfloat16):
        model = make(kind, dtype)
        x, weights = torch.randn(4, 6, dtype=dtype), {name: p.data_ptr() for name, p in model.named_parameters()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = model(x)
        with merged(model) as inside:
            assert inside is model and all(layer.merged for layer in layers(model))
            if dtype is torch.float64:
                torch.testing.assert_close(model(x), expected, **EXACT)
        assert not any(layer.merged for layer in layers(model))
        assert weights == {name: p.data_ptr() for name, p in model.named_parameters()}
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_come_back_from_an_error(kind):
    model = make(kind)
    expected = model(torch.ones(1, 6, dtype=torch.float64))
    with pytest.raises(KeyError), merged(model):
        raise KeyError
    assert torch.equal(model(torch.ones(1, 6, dtype=torch.float64)), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_what_was_merged_before_stays_merged(kind):
    model = make(kind)
    model[0].merge()
    weights = [tensor.clone() for tensor in model.state_dict().values()]
    with merged(model):
        assert all(layer.merged for layer in layers(model))
    assert [layer.merged for layer in layers(model)] == [True, False]
    assert all(map(torch.equal, weights, model.state_dict().values()))


def test_a_weight_that_two_layers_share_comes_back():
    first = LoraLinear(4, 4, r=1, dtype=torch.float64).eval()
    second = LoraLinear.from_linear(nn.Linear(4, 4, dtype=torch.float64), r=1).eval()
    second.weight = first.weight
    original = first.weight.clone()
    with merged(nn.ModuleList([first, second])):
        pass
    assert torch.equal(first.weight, original) and second.weight is first.weight


def test_inside_a_tower_costs_what_the_frozen_one_costs():
    config = CLIPVisionConfig(**TINY, image_size=8, patch_size=4)
    linears = ["q_proj", "k_proj", "v_proj", "out_proj"]
    with torch.device("meta"):
        frozen, x = CLIPVisionModel(config).eval(), torch.empty(2, 3, 8, 8)
        lora = inject_adapter_in_model(LoraConfig(r=4, target_modules=linears), CLIPVisionModel(config)).eval()

    def cost(model: nn.Module) -> tuple[int, int]:
        with torch.inference_mode(), counting() as launches, FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops(), launches.total

    before = cost(lora)
    with merged(lora):
        inside = cost(lora)
    print(f"FLOPs and launches: LoRA {before}, merged {inside}, frozen {cost(frozen)}")
    assert inside == cost(frozen)
    assert before[1] - inside[1] == 8 * 4 and before[0] > inside[0]


def test_training_mode_and_other_objects_are_refused():
    with pytest.raises(ValueError, match="model: expected a model in eval mode, got one with a LoRA layer in training"):
        with merged(make("own").train()):
            pass
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"), merged(3):
        pass
