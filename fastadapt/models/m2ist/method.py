"""M2IST for `fastadapt plan` and the benchmarks."""

from __future__ import annotations

from fastadapt.models.common.method import Method
from fastadapt.models.common.table import Share, trained
from fastadapt.models.m2ist.configuration import M2ISTConfig
from fastadapt.models.m2ist.modeling import M2ISTForGrounding

PARTS = {
    "ResNet-50": ("vision.backbone.*",),
    "DETR encoder and input projection": ("vision.*",),
    "BERT": ("text.*",),
    "interaction experts, shared up-projections": ("*_side.adapters.*.shared_up.*",),
    # the experts of attention and of the feed-forward network lie in turn
    "interaction experts, vision": ("vision_side.adapters.*[02468].*",),
    "vision experts (VEA)": ("vision_side.adapters.*[13579].*",),
    "interaction experts, text": ("text_side.adapters.*[02468].*",),
    "language experts (LEA)": ("text_side.adapters.*[13579].*",),
    "dead parameters of the release": ("dead.*",),
    "projections": ("visual_projection.*", "text_projection.*"),
    "REG token and positions": ("reg.*", "positions.*"),
    "fusion encoder": ("fusion.*",),
    "box head": ("head.*",),
}

REGIONS = {
    "fusion self-attention": ("fusion.layers.*.self_attn",),
    "fusion encoder, the rest": ("fusion*",),
    "vision side adapters": ("vision_side*",),
    "text side adapters": ("text_side*",),
    "frozen towers": ("vision", "vision.*", "text", "text.*"),
    "projections, head and loss": ("*",),
}

PUBLISHED_BASELINE = 151_000_000  # full fine-tuning of the baseline, in figure 1 of the paper


def side_parameters(model: M2ISTForGrounding) -> int:
    """Trained parameters beside the two encoders, dead ones included where the model has them."""
    modules = [model.vision_side, model.text_side, *([model.dead] if model.has("dead_parameters") else [])]
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def shares(model: M2ISTForGrounding) -> list[Share]:
    side, every = side_parameters(model), sum(p.numel() for p in model.parameters())
    return [
        Share("side adapters", side, "the baseline as published, fully fine-tuned", PUBLISHED_BASELINE),
        Share("side adapters", side, "this model without them", every - side),
        Share("all that is trained", trained(model), "this model", every),
    ]


METHOD = Method(
    config=M2ISTConfig,
    model=M2ISTForGrounding,
    parts=PARTS,
    regions=REGIONS,
    shares=shares,
    batch=64,
    preset="refcoco",
)
