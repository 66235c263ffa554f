"""Tiny transformers models with random weights, and the LoRA targets that users name for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 48}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    reads: tuple[str, ...]


FAMILIES = {
    "clip": Family(
        lambda: CLIPModel(
            CLIPConfig(
                text_config={**WIDTHS, **MLP, **TEXT}, vision_config={**WIDTHS, **MLP, **IMAGE}, projection_dim=16
            )
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("pixel_values", "input_ids"),
    ),
    "siglip": Family(
        lambda: SiglipModel(
            SiglipConfig(text_config={**WIDTHS, **MLP, **TEXT}, vision_config={**WIDTHS, **MLP, **IMAGE})
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("pixel_values", "input_ids"),
    ),
    "dinov2": Family(
        lambda: Dinov2Model(Dinov2Config(**WIDTHS, **IMAGE, mlp_ratio=2)),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        ("pixel_values",),
    ),
    "vit": Family(
        lambda: ViTModel(ViTConfig(**WIDTHS, **MLP, **IMAGE)),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        ("pixel_values",),
    ),
    "bert": Family(
        # dropout of the branches has masks of its own once fused (test_transformers.py)
        lambda: BertModel(BertConfig(**WIDTHS, **MLP, **TEXT, hidden_dropout_prob=0.0)),
        ("query", "key", "value", "dense"),
        ("input_ids",),
    ),
}


def peft_model(family: str, dtype: torch.dtype = torch.float64, **lora) -> PeftModel:
    """The family's model under PEFT LoRA with an update that is not zero; weights and adapters in `dtype`."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": list(FAMILIES[family].targets)}
    return get_peft_model(FAMILIES[family].build(), LoraConfig(**settings | lora)).to(dtype)


def batch(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two examples of what the family's model reads; the pixels are the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator).bfloat16().to(dtype),
        "input_ids": torch.randint(3, 40, (2, 7), generator=generator),
    }
    inputs["input_ids"][:, -1] = TEXT["eos_token_id"]
    return {name: inputs[name] for name in FAMILIES[family].reads}


def outputs(model: nn.Module, family: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The model's output tensors for the batch, with the random state set first."""
    torch.manual_seed(2)
    found = model(**batch(family, dtype)).to_tuple()
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def step(
    model: nn.Module, family: str, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and the gradient of every trainable parameter under a loss that weighs each output differently."""
    model.zero_grad(set_to_none=True)
    found = outputs(model, family, dtype)
    weights = [torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view_as(tensor) for tensor in found]
    sum((weight * tensor).sum() for weight, tensor in zip(weights, found)).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [tensor.detach() for tensor in found], grads
