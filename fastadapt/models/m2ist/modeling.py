"""M2IST's model: one definition, whose parts each arm chooses from a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertModel, DetrModel

from fastadapt import FusionEncoder, SideAdapter, SideAdapterBank
from fastadapt.core.checks import check_tensor
from fastadapt.models.common.base import GroundingOutput, MethodModel
from fastadapt.models.common.fusion import EagerFusionEncoder, ReleasedFusionEncoder
from fastadapt.models.common.heads import BoxHead
from fastadapt.models.common.losses import box_losses
from fastadapt.models.common.towers import DetrTower, States, bert_states
from fastadapt.models.m2ist.configuration import M2ISTConfig
from fastadapt.models.m2ist.release import DeadModules
from fastadapt.models.m2ist.side import EagerSideBank, ReleasedSideBank


class Parts(NamedTuple):
    """What an arm is made of."""

    bank: type[SideAdapterBank]
    fusion: Callable[..., nn.Module]
    folded_norms: bool


PARTS = {
    "release": Parts(ReleasedSideBank, ReleasedFusionEncoder, folded_norms=False),
    "strong": Parts(EagerSideBank, EagerFusionEncoder, folded_norms=True),
    "fastadapt": Parts(SideAdapterBank, FusionEncoder, folded_norms=True),
}


class M2ISTForGrounding(MethodModel):
    """The box of what a sentence names in an image (Liu et al., "M2IST", arXiv 2407.01131, 2024).

        V = E + S + sum_i IEA_v,i(m_i) + sum_i VEA_i(f_i)       of DETR's encoder: S its input, E its output
        T = H + X + sum_i IEA_t,i(a_i) + sum_i LEA_i(g_i)       of BERT: X its embedding, H its output
        box = head(fusion([REG | T W_t | V W_v])_REG)

    m_i, f_i and a_i, g_i are the results of attention and feed-forward network of layer i, i = 0 ... 5 (`SideAdapterBank`).
    The towers are frozen and no gradient enters them: all that the backward keeps of them is these taps.

    loss = the sum of the absolute differences of the box + 1 - GIoU, averaged over the batch.
    """

    config_class = M2ISTConfig
    towers = {"vision": DetrModel, "text": BertModel}
    rates = {"*_side.*": 0.1, "dead.*": 0.1}  # of 1e-4

    def __init__(self, config: M2ISTConfig) -> None:
        super().__init__(config)
        parts = PARTS[config.arm]
        self.vision = DetrTower(config.tower("vision_config"), parts.folded_norms)
        self.text = BertModel(config.tower("text_config"), add_pooling_layer=False)
        width, layers = config.vision_config.d_model, self.text.encoder.layer[: config.side_layers]
        self.vision_side, self.text_side = parts.bank.m2ist(
            [layer.attention.output.LayerNorm for layer in layers],
            [layer.output.LayerNorm for layer in layers],
            width,
            config.bottleneck,
        )
        self.visual_projection = nn.Linear(width, width)
        self.text_projection = nn.Linear(config.text_config.hidden_size, width)
        self.reg = nn.Embedding(1, width)
        self.positions = nn.Embedding(config.tokens, width)
        self.fusion = parts.fusion(
            width, config.fusion_heads, config.fusion_layers, config.fusion_hidden, config.fusion_dropout
        )
        self.head = BoxHead(width)
        if self.has("dead_parameters"):
            self.dead = DeadModules(width, config.text_config.hidden_size, config.side_layers)
        shared = [f"adapters.{2 * i}.shared_up.{kind}" for i in range(config.side_layers) for kind in ("weight", "bias")]
        self._tied_weights_keys = {f"text_side.{name}": f"vision_side.{name}" for name in shared}
        self.finish()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SideAdapter) and module.shared_up is not None:
            nn.init.normal_(module.shared_up.weight, std=0.02)
            nn.init.zeros_(module.shared_up.bias)
        if isinstance(module, SideAdapterBank) and module is self.vision_side and self.has("uniform_vision_biases"):
            for adapter in module.adapters:
                for linear in (adapter.down_proj, adapter.up_proj):
                    if linear is not None:
                        nn.init.uniform_(linear.bias)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> GroundingOutput:
        """The box of each pair of an image and a sentence, and its loss where the true boxes are given.

        Args:
            pixel_values: (B, 3, image_size, image_size).
            pixel_mask: (B, image_size, image_size), 1 for image and 0 for padding; no padding by default.
            input_ids: (B, text_length).
            attention_mask: (B, text_length), 1 for words and 0 for padding; no padding by default.
            labels: (B, 4), centre and size of the box, (cx, cy, w, h), as parts of the padded image.

        Raises:
            ValueError: a tensor of another shape.
        """
        size, batch = self.config.image_size, len(pixel_values)
        self.check_inputs(pixel_values, input_ids=input_ids)
        pixel_mask = pixel_values.new_ones(batch, size, size) if pixel_mask is None else pixel_mask
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad():
            vision = self.vision(pixel_values, pixel_mask)
            text = bert_states(
                self.text,
                input_ids,
                attention_mask,
                self.config.side_layers,
                double_norm=self.has("bert_double_norm"),
                types=not self.has("no_token_types"),
            )
        places = self.visual_projection(self._side(self.vision_side, vision))
        words = self.text_projection(self._side(self.text_side, text))
        reg = self.reg.weight.to(places.dtype).expand(batch, 1, -1)
        padding = torch.cat([torch.zeros_like(text.padding[:, :1]), text.padding, vision.padding], 1)
        fused = self.fusion(torch.cat([reg, words, places], 1), self.positions.weight, padding, rows=1)
        boxes = self.head(fused[:, 0])
        if labels is None:
            return GroundingOutput(pred_boxes=boxes)
        check_tensor("labels", labels, (batch, 4), boxes.device)
        losses = box_losses(boxes, labels)
        return GroundingOutput(loss=losses["l1"] + losses["giou"], pred_boxes=boxes, losses=losses)

    def _side(self, bank: SideAdapterBank, states: States) -> Tensor:
        taps = [tap for layer in states.taps[: self.config.side_layers] for tap in layer]
        return bank(taps, (states.output, states.embedding))
