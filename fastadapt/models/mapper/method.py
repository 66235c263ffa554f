"""MaPPER for `fastadapt plan` and the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.models.common.method import Method, grounding_inputs
from fastadapt.models.common.table import Share, trained
from fastadapt.models.mapper.configuration import MaPPERConfig
from fastadapt.models.mapper.modeling import MaPPERForGrounding

PARTS = {
    "LoCA": ("vision.*.adapter.*",),
    "DyPA": ("text.*.adapter.*",),
    "dead parameters of the release": ("dead.*",),
    "prior-guided text (PGT)": ("guide.*",),
    "DINOv2": ("vision.*",),
    "BERT": ("text.*",),
    "CLIP's text tower": ("prior.*",),
    "projections": ("visual_projection.*", "text_projection.*"),
    "REG token and positions": ("reg.*", "positions.*"),
    "fusion encoder": ("fusion.*",),
    "box head": ("head.*",),
}

REGIONS = {
    "LoCA": ("vision.*.adapter",),
    "DyPA": ("text.*.adapter",),
    "image tower, attention": ("vision.encoder.layer.*.attention",),
    "image tower, the rest": ("vision", "vision.*"),
    "text towers": ("text", "text.*", "prior", "prior.*"),
    "fusion self-attention": ("fusion.layers.*.self_attn",),
    "fusion encoder, the rest": ("fusion*",),
    "projections, head and loss": ("*",),
}

# of DINOv2 ViT-B/14 and of BERT-base with its pooler: what the paper's percentage is of
PUBLISHED_TOWERS = 86_580_480 + 109_482_240


def tuned_parameters(model: MaPPERForGrounding) -> int:
    """Trained parameters in the backbones, dead ones included where the model has them."""
    modules = [*model.tuned(), model.guide, *([model.dead] if model.has("dead_parameters") else [])]
    return sum(p.numel() for module in modules for p in module.parameters())


def shares(model: MaPPERForGrounding) -> list[Share]:
    tuned, every = tuned_parameters(model), sum(p.numel() for p in model.parameters())
    return [
        Share("LoCA, DyPA and PGT", tuned, "DINOv2 and BERT as published", PUBLISHED_TOWERS),
        Share("LoCA, DyPA and PGT", tuned, "this model", every),
        Share("all that is trained", trained(model), "this model", every),
    ]


def inputs(config: MaPPERConfig, batch: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Images, sentences in both vocabularies and boxes drawn at random."""
    ids = torch.randint(1, config.prior_config.vocab_size, (batch, config.text_length), device=device)
    return {**grounding_inputs(config, batch, device), "prior_ids": ids}


METHOD = Method(
    config=MaPPERConfig,
    model=MaPPERForGrounding,
    parts=PARTS,
    regions=REGIONS,
    shares=shares,
    batch=32,
    preset="refcoco",
    inputs=inputs,
)
