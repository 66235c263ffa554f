"""freeze_position_embeddings and compile_frozen: what they find, and what the first saves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt import compile_frozen, freeze_position_embeddings
from tests.tolerance import SINGLE

TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}


class OpenAIs(nn.Module):
    """Names as in OpenAI's CLIP, and names that only look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(3, 2))
        self.pos_embed = nn.Parameter(torch.zeros(3, 2))
        self.token_embedding, self.positional_embedding_norm = nn.Embedding(3, 2), nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (OpenAIs(), ["positional_embedding", "pos_embed"]),
        (CLIPVisionModel(CLIPVisionConfig(**TINY, **IMAGE)), ["embeddings.position_embedding.weight"]),
        (CLIPTextModel(CLIPTextConfig(**TINY, vocab_size=9)), ["embeddings.position_embedding.weight"]),
        (ViTModel(ViTConfig(**TINY, **IMAGE)), ["embeddings.position_embeddings"]),
    ],
)
def test_the_tables_and_nothing_else_freeze_and_thaw(model, names):
    found = freeze_position_embeddings(model)
    assert [name.split("vision_model.")[-1].split("text_model.")[-1] for name in found] == names
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(found)
    assert freeze_position_embeddings(model, frozen=False) == found
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_position_embeddings_raises():
    with pytest.raises(ValueError, match="model: expected a model with parameters named as position embeddings"):
        freeze_position_embeddings(nn.Linear(2, 2))


def test_the_blocks_before_the_first_adapter_keep_nothing_and_have_no_backward():
    """ETRIS's ViT-B/16 at 416 pixels, whose first bridge is after block 4."""
    config = CLIPVisionConfig(patch_size=16, image_size=416, attn_implementation="sdpa")
    with torch.device("meta"):
        tower = CLIPVisionModel(config).requires_grad_(False)
        bridge = nn.Parameter(torch.zeros(768))
        image = torch.empty(1, 3, 416, 416)
    block = next(module for name, module in tower.named_modules() if name.endswith("layers.4"))
    block.register_forward_pre_hook(lambda module, args: (args[0] + bridge, *args[1:]))
    kept, flops = {}, {}
    for frozen in (False, True):
        freeze_position_embeddings(tower, frozen)
        with as_on_cuda():
            kept[frozen] = saved_bytes(lambda: tower(image).last_hidden_state, [*tower.parameters(), image])
            with FlopCounterMode(display=False) as counter:
                tower(image).last_hidden_state.sum().backward()
        flops[frozen] = counter.get_total_flops()
        print(f"frozen {frozen}: {kept[frozen] / 2**20:.1f} MiB, {flops[frozen] / 1e9:.1f} GFLOP")
    assert kept[False] / kept[True] == pytest.approx(12 / 8, rel=0.02)
    linears, attention = 4 * 2 * 677 * 12 * 768**2, 4 * 5 * 2 * 677**2 * 768
    assert flops[False] - flops[True] == linears + attention


def lora_on(layers: list[int]) -> nn.Module:
    model = CLIPVisionModel(CLIPVisionConfig(**TINY, **IMAGE)).requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=layers), model)


def test_frozen_blocks_compile_one_by_one_and_the_result_stays():
    model, graphs = lora_on([1]), []
    x = torch.randn(2, 3, 8, 8)
    expected = model(x).last_hidden_state
    state = list(model.state_dict())

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    names = compile_frozen(model, backend=backend)
    assert any(name.endswith("layers.0") for name in names) and any(name.endswith("layers.2") for name in names)
    inside = [name for name in names if "layers.1" in name]
    assert inside and all(name.endswith("mlp") for name in inside)
    assert not any(p.requires_grad for name in names for p in model.get_submodule(name).parameters())
    torch.testing.assert_close(model(x).last_hidden_state, expected, **SINGLE)
    assert len(graphs) >= 3 and list(model.state_dict()) == state
    model(x).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_wholly_frozen_model_compiles_whole_and_a_trained_one_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).requires_grad_(False)
    assert compile_frozen(model, backend="eager") == [""]
    assert model(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(ValueError, match="model: expected a model with a frozen submodule"):
        compile_frozen(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
