"""Bytes that a block of CLIP ViT-B/16 with LoRA on all six linears keeps for the backward, counted without a GPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt.integrations.peft import fuse_layer, lora_layers

BATCH, TOKENS, WIDTH, HIDDEN, RANK = 32, 197, 768, 3072, 16
LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
MOST = 1.65


def block(activation: str) -> nn.Module:
    """A frozen block in bfloat16, with attention as on a GPU."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 12}
    config = CLIPVisionConfig(**sizes, hidden_act=activation)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return CLIPEncoderLayer(config).to(torch.bfloat16).requires_grad_(False).train()


def with_lora(activation: str) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.1, target_modules=LINEARS)
    return inject_adapter_in_model(config, block(activation)).to(torch.bfloat16)


def with_fused_linears(activation: str) -> nn.Module:
    """PEFT's with its linears alone fused: what the operation saves without the block around it (test_transformers_cost.py)."""
    layer = with_lora(activation)
    for _, linear in lora_layers(layer):
        fuse_layer(linear)
    return layer


# CLIP's own keeps more for itself than the one of ViT and DINOv2, beside which LoRA weighs more
@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def kept(request: pytest.FixtureRequest) -> dict[str, int]:
    """Bytes by kind of block; the block's input, which the block before it made, counts as well where it is kept."""
    blocks = {"frozen": block, "PEFT": with_lora, "fastadapt": with_fused_linears}
    found = {}
    for name, build in blocks.items():
        layer = build(request.param)
        x = torch.empty(BATCH, TOKENS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
        with as_on_cuda():
            found[name] = saved_bytes(lambda: layer(x, attention_mask=None), exclude=layer.parameters())
    return found


def test_a_block_keeps_at_most_1_65_times_what_the_frozen_one_does(kept):
    times = {name: size / kept["frozen"] for name, size in kept.items()}
    print(", ".join(f"{name} {kept[name] / 2**20:.1f} MiB ({times[name]:.2f}x)" for name in kept))
    assert times["fastadapt"] <= MOST
    assert times["PEFT"] > 1.9  # the measure sees what there is to save


def test_what_is_kept_is_each_linears_input_once_and_six_narrow_products(kept):
    """q, k and v share their input, LayerNorm keeps it anyway, and attention its output, which out_proj reads."""
    tokens = BATCH * TOKENS
    x, hidden, product, seed = 2 * tokens * WIDTH, 2 * tokens * HIDDEN, 2 * tokens * RANK, 8
    normed_twice, activated = 2 * x, hidden
    assert kept["fastadapt"] - kept["frozen"] == normed_twice + activated + 6 * (product + seed)
