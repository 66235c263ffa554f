"""What a fused transformers layer keeps for the backward and launches, counted without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import BertConfig, CLIPVisionConfig, Dinov2Config, ViTConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from bench.case import FASTADAPT, PEFT
from bench.cases import clip_lora
from bench.counters import counting
from bench.memory import saved_bytes
from bench.meta import as_on_cuda
from fastadapt.core.casts import frozen_cast
from fastadapt.integrations.transformers import fuse_layer

BATCH, TOKENS, WIDTH, HIDDEN, HEADS, RANK = 32, 197, 768, 3072, 12, 16
STREAM = 2 * BATCH * TOKENS * WIDTH  # bytes of x in 16 bits
SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS}
KINDS = {
    "clip": (CLIPEncoderLayer, CLIPVisionConfig(**SIZES)),
    "clip gelu": (CLIPEncoderLayer, CLIPVisionConfig(**SIZES, hidden_act="gelu")),
    "vit": (ViTLayer, ViTConfig(**SIZES)),
    "dinov2": (Dinov2Layer, Dinov2Config(hidden_size=WIDTH, num_attention_heads=HEADS)),
    "bert": (BertLayer, BertConfig(**SIZES)),
}
LINEARS = r".*(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|query|key|value|dense)"


def block(kind: str) -> nn.Module:
    """A frozen layer in bfloat16 that trains, with attention as on a GPU."""
    cls, config = KINDS[kind]
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return cls(config).to(torch.bfloat16).requires_grad_(False).train()


def with_lora(kind: str, dropout: float = 0.1) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=LINEARS)
    return inject_adapter_in_model(config, block(kind)).to(torch.bfloat16)


def fused(layer: nn.Module, recompute: bool = False) -> nn.Module:
    fuse_layer(layer)
    layer.recompute = recompute
    return layer


def kept(layer: nn.Module, needs_x: bool = True) -> int:
    x = torch.empty(BATCH, TOKENS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=needs_x)
    with as_on_cuda():
        return saved_bytes(lambda: layer(x, attention_mask=None), exclude=layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_kept_bytes(kind):
    found = {
        "transformers": kept(block(kind)),
        "frozen": kept(fused(block(kind))),
        "LoRA": kept(fused(with_lora(kind))),
        "LoRA as PEFT has it": kept(with_lora(kind)),
        "LoRA, recomputed": kept(fused(with_lora(kind), recompute=True)),
    }
    print(f"{kind}: " + ", ".join(f"{name} {size / STREAM:.2f} C" for name, size in found.items()))
    assert found["frozen"] <= found["transformers"]
    # post-LN: LoRA on q, k and v reads the block's input, a LayerNorm's output that is the previous block's to make anew
    assert found["LoRA"] - (STREAM if kind == "bert" else 0) <= 1.03 * found["frozen"]
    assert found["LoRA, recomputed"] <= 0.35 * found["frozen"]
    assert found["LoRA as PEFT has it"] > 1.6 * found["LoRA"]


@pytest.mark.parametrize("kind", ["clip gelu", "vit"])
def test_a_frozen_block_keeps_ten_streams_and_lora_adds_six_narrow_products(kind):
    rows = BATCH * TOKENS
    statistics = 4 * HEADS * rows + 2 * 8  # attention's log-sum-exp, and its seed and offset
    assert abs(kept(fused(block(kind))) - 10 * STREAM - statistics) <= 64
    added = kept(fused(with_lora(kind))) - kept(fused(block(kind)))
    assert 0 <= added - 6 * 2 * rows * RANK <= 256  # and the seeds
    assert kept(fused(with_lora(kind, dropout=0.0))) - kept(fused(block(kind))) == 6 * 2 * rows * RANK


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_before_the_first_adapter_keeps_nothing(recompute):
    assert kept(fused(block("clip"), recompute), needs_x=False) == 0


def test_frozen_float32_weights_are_cast_once_and_not_kept_anew():
    """Under autocast two steps keep the very same copies of the weights, and nothing else of their size."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = CLIPVisionConfig(**sizes)
    config._attn_implementation = "sdpa"
    layer = fused(CLIPEncoderLayer(config).requires_grad_(False))
    x = torch.randn(1, 3, 64, requires_grad=True)
    seen = []
    for _ in range(2):
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor, held=held) -> Tensor:
            held[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            y = layer(x, None)
        assert y.dtype == torch.bfloat16
        seen.append({p: t for p, t in held.items() if t.dtype == torch.bfloat16 and t.numel() >= 64 * 64})
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) == 6
    with torch.no_grad():
        layer.mlp.fc1.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer(x, None), y)


def launches(step: Callable[[], None]) -> int:
    with as_on_cuda(), counting() as found:
        step()
    print(dict(found.torch), dict(found.triton))
    return found.total


@pytest.mark.parametrize("precision, pefts", [("bfloat16", 1277), ("float32 under bfloat16 autocast", 2026)])
def test_a_training_step_launches_a_third_of_what_pefts_does(precision, pefts):
    """CLIP ViT-B/16 with LoRA on six linears, batch 32: forward and backward, loss and patches included, optimizer left out.

    Under autocast no copy of a frozen weight is kept beside those that are made once.
    """
    case = clip_lora.case(precision, 32)
    inputs = case.make_inputs(torch.device("meta"))
    arms = {name: case.arms[name](inputs) for name in (PEFT, FASTADAPT)}
    ours = arms[FASTADAPT]
    with as_on_cuda():
        ours.forward(0)
        frozen = [frozen_cast(t, torch.bfloat16) for t in ours.constants if not t.requires_grad]
        kept = saved_bytes(lambda: ours.forward(0), [*ours.constants, *frozen]) / STREAM
    found = {name: launches(lambda arm=arm: arm.backward(arm.forward(0))) for name, arm in arms.items()}
    print(found, f"{kept:.2f} C")
    assert found[PEFT] == pefts
    assert found[FASTADAPT] <= found[PEFT] / 3
    assert kept <= 12 * 10.16 + 1.1  # and the norm before the blocks
