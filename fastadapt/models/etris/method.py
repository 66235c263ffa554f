"""ETRIS for `fastadapt plan` and the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.models.common.method import Method, grounding_inputs
from fastadapt.models.common.table import Share, trained
from fastadapt.models.etris.configuration import ETRISConfig
from fastadapt.models.etris.modeling import ETRISForSegmentation

PARTS = {
    "position embeddings, image": ("vision.*.position_embedding.*", "vision.attnpool.positional_embedding"),
    "position embeddings, text": ("text.*.position_embedding.*",),
    "the attention pool's shortcut": ("vision.attnpool.connect.*",),
    "CLIP's image tower, the rest": ("vision.*",),
    "CLIP's text tower, the rest": ("text.*", "logit_scale"),
    "Bridger": ("bridger.*",),
    "HA, the gates' dead queries and keys": ("neck.dead.*",),
    "HA": ("neck.*",),
    "GA": ("decoder.*",),
    "Projector": ("projector.*",),
}

REGIONS = {
    "image tower": ("vision", "vision.*"),
    "text tower": ("text", "text.*"),
    "Bridger": ("bridger*",),
    "HA": ("neck*",),
    "GA": ("decoder*",),
    "Projector": ("projector*",),
    "loss": ("*",),
}

CLIP_PLACES = 14 * 14  # of CLIP ViT-B/16, whose images have 224 pixels


def shares(model: ETRISForSegmentation) -> list[Share]:
    """The Bridger as a part of the image tower, of which the paper gives 1.61 to 3.38 %; and all that is trained."""
    config = model.config
    backbone = sum(p.numel() for p in model.vision.parameters())
    if not config.is_resnet:
        backbone -= max(config.grid**2 - CLIP_PLACES, 0) * config.vision_config.hidden_size
    bridger, every = (sum(p.numel() for p in module.parameters()) for module in (model.bridger, model))
    return [
        Share("Bridger", bridger, "the image tower, at 224 pixels", backbone),
        Share("all that is trained", trained(model), "this model", every),
    ]


def inputs(config: ETRISConfig, batch: int, device: torch.device | str) -> dict[str, Tensor]:
    """Images and sentences drawn at random, the last quarter of each sentence padding, as CLIP's tokenizer makes it; masks."""
    found = grounding_inputs(config, batch, device)
    end, last = config.text_config.vocab_size - 1, 3 * config.text_length // 4 - 1
    found["input_ids"] = found["input_ids"].clamp(max=end - 1) * found["attention_mask"]
    found["input_ids"][:, last] = end
    found["labels"] = (torch.rand(batch, config.image_size, config.image_size, device=device) < 0.3).float()
    return found


METHOD = Method(
    config=ETRISConfig,
    model=ETRISForSegmentation,
    parts=PARTS,
    regions=REGIONS,
    shares=shares,
    batch=16,  # 32 on two GPUs
    preset="vit-b",
    inputs=inputs,
)
