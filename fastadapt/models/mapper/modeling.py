"""MaPPER's model: one definition, whose parts each arm chooses from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertModel, CLIPTextModelWithProjection, Dinov2Model
from transformers import initialization as init

from fastadapt import DynamicPriorAdapter, FusionEncoder, LoCA, PriorGuidedText, fuse
from fastadapt.core.checks import check_tensor, fail
from fastadapt.models.common.base import GroundingOutput, MethodModel
from fastadapt.models.common.fusion import EagerFusionEncoder, ReleasedFusionEncoder
from fastadapt.models.common.heads import BoxHead
from fastadapt.models.common.losses import box_losses
from fastadapt.models.mapper.adapters import EagerDyPA, EagerGuide, EagerLoCA
from fastadapt.models.mapper.configuration import MaPPERConfig
from fastadapt.models.mapper.release import DeadModules
from fastadapt.models.mapper.towers import (
    FrozenLayerNorm,
    FusedImageLayer,
    FusedTextLayer,
    ImageLayer,
    ReleasedImageLayer,
    TextLayer,
    image_states,
    prior_states,
    text_states,
)


class Parts(NamedTuple):
    """What an arm is made of."""

    image_layer: type[ImageLayer]
    text_layer: type[TextLayer]
    loca: type[LoCA]
    dypa: type[DynamicPriorAdapter]
    guide: type[PriorGuidedText]
    fusion: Callable[..., nn.Module]
    fused_towers: bool


PARTS = {
    "release": Parts(ReleasedImageLayer, TextLayer, EagerLoCA, EagerDyPA, EagerGuide, ReleasedFusionEncoder, False),
    "strong": Parts(ImageLayer, TextLayer, EagerLoCA, EagerDyPA, EagerGuide, EagerFusionEncoder, False),
    "fastadapt": Parts(FusedImageLayer, FusedTextLayer, LoCA, DynamicPriorAdapter, PriorGuidedText, FusionEncoder, True),
}


class MaPPERForGrounding(MethodModel):
    """The box of what a sentence names in an image (Liu et al., "MaPPER", arXiv 2409.13609, EMNLP 2024).

        P = CLIP(prior_ids),      the text tower's projected state of every word
        V = DINOv2(image), with LoCA in layers 3, 7 and 11: x + c o (MLP(n) + 0.2 LoCA(n)),   n = LN(x)
        T = BERT(input_ids), with DyPA there: LN(a + FFN(a)) + DyPA(a, P),   a the attention's result
        box = head(fusion([REG | [T | P] W_p W_t | V W_v])_REG)

    The towers are frozen; before the first adapter nothing of them is kept for the backward.  P depends on the sentence alone:
    `fastadapt.SentenceCache(model.prior, model.encode_prior)` computes it once for each, and `forward` takes it.

    loss = the sum of the absolute differences of the box + 1 - GIoU, averaged over the batch.
    """

    config_class = MaPPERConfig
    towers = {"vision": Dinov2Model, "text": BertModel, "prior": CLIPTextModelWithProjection}
    added = ("*.adapter.*",)
    rates = {"*.adapter.*": 0.1, "dead.*": 0.1}  # of 1e-4

    def __init__(self, config: MaPPERConfig) -> None:
        super().__init__(config)
        parts, width = PARTS[config.arm], config.fusion_width
        self.vision = Dinov2Model(config.tower("vision_config"))
        self.text = BertModel(config.tower("text_config"), add_pooling_layer=False)
        prior = config.tower("prior_config")
        prior._attn_implementation = "sdpa"  # in the release too, whose CLIP asks for no maps
        self.prior = CLIPTextModelWithProjection(prior)
        image_dim, text_dim = config.vision_config.hidden_size, config.text_config.hidden_size
        prior_dim = config.prior_config.projection_dim
        self._adapt(parts, image_dim, text_dim, prior_dim)
        self.guide = parts.guide(text_dim, prior_dim, text_dim)
        self.visual_projection = nn.Linear(image_dim, width)
        self.text_projection = nn.Linear(text_dim, width)
        self.reg = nn.Embedding(1, width)
        self.positions = nn.Embedding(config.tokens, width)
        self.fusion = self._make_fusion(parts.fusion)(
            width, config.fusion_heads, config.fusion_layers, config.fusion_hidden, config.fusion_dropout
        )
        self.head = BoxHead(width)
        if self.has("dead_parameters"):
            self.dead = DeadModules(prior_dim, config.bottleneck, len(config.adapted_layers))
        self.finish()

    def _adapt(self, parts: Parts, image_dim: int, text_dim: int, prior_dim: int) -> None:
        """Put the adapters into the towers, and make these what the arm runs."""
        config, layers = self.config, self.vision.encoder.layer
        channels = config.point_channels, config.reduced_channels, config.local_channels
        for index in config.adapted_layers:
            image_layer, text_layer = layers[index], self.text.encoder.layer[index]
            image_layer.__class__, text_layer.__class__ = parts.image_layer, parts.text_layer
            image_layer.adapter = parts.loca(image_dim, *channels)
            text_layer.adapter = parts.dypa(text_dim, prior_dim, config.bottleneck)
        if parts.fused_towers:
            for tower in (self.vision, self.text, self.prior):
                fuse(tower)
            self.vision.layernorm.__class__ = FrozenLayerNorm
            for layer in layers[config.adapted_layers[0] :]:  # those before keep nothing anyway
                if not isinstance(layer, ImageLayer):
                    layer.recompute = config.recompute

    def _make_fusion(self, kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return partial(kind, recompute=self.config.recompute) if kind is FusionEncoder else kind

    def tuned(self) -> Iterator[nn.Module]:
        for tower in (self.vision, self.text):
            for index in self.config.adapted_layers:
                yield tower.encoder.layer[index].adapter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        with init.guard_torch_init_functions():
            for adapter in self.tuned():  # which transformers has started as it does their towers' own modules
                self._init_weights(adapter)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DynamicPriorAdapter) and self.has("normal_dypa"):
            for linear in (module.gate_proj, module.down_proj, module.up_proj):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def encode_prior(self, prior_ids: Tensor) -> Tensor:
        """The prior (B, L, P) of CLIP's ids (B, L)."""
        return prior_states(self.prior, prior_ids)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prior_ids: Tensor | None = None,
        prior: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> GroundingOutput:
        """The box of each pair of an image and a sentence, and its loss where the true boxes are given.

        Args:
            pixel_values: (B, 3, image_size, image_size).
            pixel_mask: (B, image_size, image_size), 1 for image and 0 for padding; no padding by default.  The pixel at the top
                left of a patch decides.
            input_ids: (B, text_length), BERT's.
            attention_mask: (B, text_length), 1 for words and 0 for padding; no padding by default.
            prior_ids: (B, text_length), CLIP's; with parity "bert_ids_for_prior" input_ids by default.
            prior: (B, text_length, projection_dim), what `encode_prior` makes of prior_ids, which are then not needed.
            labels: (B, 4), centre and size of the box, (cx, cy, w, h), as parts of the padded image.

        Raises:
            ValueError: a tensor of another shape.
        """
        length, batch = self.config.text_length, len(pixel_values)
        if prior_ids is None and self.has("bert_ids_for_prior"):
            prior_ids = input_ids
        self.check_inputs(pixel_values, input_ids=input_ids, **({"prior_ids": prior_ids} if prior is None else {}))
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if prior is None:
            prior = self.encode_prior(prior_ids)
        check_tensor("prior", prior, (batch, length, self.config.prior_config.projection_dim), pixel_values.device)

        words_out = attention_mask == 0
        places = self.visual_projection(image_states(self.vision, pixel_values))
        text = text_states(self.text, input_ids, words_out, prior, types=not self.has("no_token_types"))
        words = self.text_projection(self.guide(text, prior))
        reg = self.reg.weight.to(places.dtype).expand(batch, 1, -1)
        tokens = torch.cat([reg, words, places], 1)
        fused = self.fusion(tokens, self.positions.weight, self._padding(words_out, pixel_mask, tokens), rows=1)
        boxes = self.head(fused[:, 0])
        if labels is None:
            return GroundingOutput(pred_boxes=boxes)
        check_tensor("labels", labels, (batch, 4), boxes.device)
        losses = box_losses(boxes, labels)
        return GroundingOutput(loss=losses["l1"] + losses["giou"], pred_boxes=boxes, losses=losses)

    def _padding(self, words_out: Tensor, pixel_mask: Tensor | None, tokens: Tensor) -> Tensor:
        """Of [REG, words, CLS, patches] which are padding: True, or what is added to the scores of these keys."""
        batch, grid, step = len(tokens), self.config.grid, self.config.vision_config.patch_size
        if pixel_mask is None:
            places_out = words_out.new_zeros(batch, grid * grid)
        else:
            if pixel_mask.shape != (batch, *[self.config.image_size] * 2):
                fail("pixel_mask", f"shape {(batch, *[self.config.image_size] * 2)}", tuple(pixel_mask.shape))
            places_out = (pixel_mask[:, ::step, ::step] == 0).flatten(1)
        never = words_out.new_zeros(batch, 1)
        padding = torch.cat([never, words_out, never, places_out], 1)
        return padding.to(tokens.dtype) if self.has("additive_mask") else padding
