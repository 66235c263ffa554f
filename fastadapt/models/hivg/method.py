"""HiVG for `fastadapt plan` and the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.models.common.method import Method, grounding_inputs
from fastadapt.models.common.table import Share, trained
from fastadapt.models.hivg.configuration import HiVGConfig
from fastadapt.models.hivg.modeling import HiVGForGrounding

PARTS = {
    "image tower's LoRA": ("clip.vision_model.*.pairs.*",),
    "text tower's LoRA": ("clip.text_model.*.pairs.*",),
    "CLIP's image tower": ("clip.vision_model.*",),
    "CLIP's text tower": ("clip.text_model.*",),
    "CLIP's projections and logit scale": ("clip.*",),
    "bridges, LoRA on their projections": ("bridges.*.pairs.*", "bridges.lora.*"),
    "bridges, adaptive weights": ("bridges.token_weight",),
    "bridges, gate": ("bridges.gate_*", "mixup_projection.*"),
    "bridges, cross-attention": ("bridges.kv_*", "bridges.visual.*_proj.*"),
    "bridges, MLP": ("bridges.visual.*.fc[12].*",),
    "bridges, LayerNorm": ("bridges.visual.*.norm.*",),
    "dead parameters of the release": ("dead.*",),
    "projection of the image's levels": ("levels_projection.*",),
    "projections of image and text": ("visual_projection.*", "text_projection.*"),
    "REG token and positions": ("reg.*", "positions.*"),
    "fusion encoder": ("fusion.*",),
    "box head": ("head.*",),
    "token head": ("token_head.*",),
    "segmentation head": ("segmentation.*",),
}

REGIONS = {
    "bridges": ("bridges*",),
    "image tower, attention and its LoRA": ("clip.vision_model.encoder.layers.*.self_attn*",),
    "image tower, the rest": ("clip.vision_model*",),
    "text tower": ("clip.text_model*",),
    "fusion self-attention": ("fusion.layers.*.self_attn",),
    "fusion encoder, the rest": ("fusion*",),
    "token head": ("token_head*",),
    "segmentation head": ("segmentation*",),
    "projections, box head and losses": ("*",),
}


def shares(model: HiVGForGrounding) -> list[Share]:
    every, tuned = sum(p.numel() for p in model.parameters()), trained(model)
    clip = sum(p.numel() for name, p in model.clip.named_parameters() if ".pairs." not in name)
    return [Share("all that is trained", tuned, "this model", every), Share("all that is trained", tuned, "CLIP", clip)]


def inputs(config: HiVGConfig, batch: int, device: torch.device | str) -> dict[str, Tensor]:
    """`grounding_inputs` with sentences as CLIP's tokenizer makes them: the largest id is their end, and 0 is padding."""
    found = grounding_inputs(config, batch, device)
    end, last = config.text_config.vocab_size - 1, 3 * config.text_length // 4 - 1
    found["input_ids"] = found["input_ids"].clamp(max=end - 1) * found["attention_mask"]
    found["input_ids"][:, last] = end
    return found


METHOD = Method(
    config=HiVGConfig,
    model=HiVGForGrounding,
    parts=PARTS,
    regions=REGIONS,
    shares=shares,
    batch=40,
    preset="base-refcoco-stage3",
    inputs=inputs,
)
