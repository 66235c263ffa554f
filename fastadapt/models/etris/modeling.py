"""ETRIS's model: one definition, whose parts each arm chooses from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection
from transformers.utils import ModelOutput

from fastadapt import Bridger, GlobalAlignment, HierarchicalAlignment, Projector, freeze_position_embeddings, fuse
from fastadapt.core.checks import check_tensor, fail
from fastadapt.models.common.base import MethodModel
from fastadapt.models.common.losses import mask_loss
from fastadapt.models.etris.bridger import EagerBridger
from fastadapt.models.etris.configuration import ETRISConfig
from fastadapt.models.etris.decoder import EagerNeck, EagerProjector, Neck
from fastadapt.models.etris.openai import from_openai
from fastadapt.models.etris.positions import resized
from fastadapt.models.etris.release import ReleasedBridger, ReleasedGlobalAlignment, ReleasedNeck
from fastadapt.models.etris.resnet import CLIPResNet, ConvNorm, conv_norm, folded_conv_norm
from fastadapt.models.etris.towers import CLIPViT, text_pieces


class Parts(NamedTuple):
    """What an arm is made of."""

    conv_norm: ConvNorm
    prepare: Callable[[nn.Module], object]  # of a transformer
    bridger: type[Bridger]
    neck: type[Neck]
    decoder: type[GlobalAlignment]
    projector: type[Projector]


PARTS = {
    "release": Parts(
        conv_norm, lambda tower: None, ReleasedBridger, ReleasedNeck, ReleasedGlobalAlignment, EagerProjector
    ),
    "strong": Parts(folded_conv_norm, lambda tower: None, EagerBridger, EagerNeck, GlobalAlignment, EagerProjector),
    "fastadapt": Parts(folded_conv_norm, fuse, Bridger, Neck, GlobalAlignment, Projector),
}


@dataclass
class SegmentationOutput(ModelOutput):
    """What a segmentation model returns.

    loss: scalar, where masks were given.
    logits: (B, 1, H, W) of the mask, a quarter of the image's height and width.
    losses: the terms of the loss by name.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class ETRISForSegmentation(MethodModel):
    """The mask of what a sentence names in an image (Xu et al., "Bridging Vision and Language Encoders", ICCV 2023).

        x_i, y_i = stage_i(blocks(x_{i-1}), blocks(y_{i-1})),  i = 1, 2, 3      (`fastadapt.Bridger`)
        t = LN(y_3),      s = t_EOS P
        f = HA([x_1, x_2, pool(x_3)], s)      (`fastadapt.HierarchicalAlignment`)
        logits = projector(GA(f, t), s)      (`fastadapt.GlobalAlignment`, `fastadapt.Projector`)

    x and y are the streams of CLIP's two frozen towers; pool is a ViT's last norm and projection, or a ResNet's attention pool.

    loss = binary cross-entropy with the mask, its nearest neighbours taken at the logits' size.
    """

    config_class = ETRISConfig
    towers = {"vision": CLIPViT, "text": CLIPTextModelWithProjection}
    added = ("vision.attnpool.connect.*",)

    def __init__(self, config: ETRISConfig) -> None:
        super().__init__(config)
        parts, vision, text = PARTS[config.arm], config.tower("vision_config"), config.tower("text_config")
        # CLIP asks its attention for no map, and torch computes that without one: in the release, too
        vision._attn_implementation = text._attn_implementation = {"": "sdpa"}
        self.text = CLIPTextModelWithProjection(text)
        parts.prepare(self.text)
        if config.is_resnet:
            self.towers = {**self.towers, "vision": CLIPResNet}
            self.vision = CLIPResNet(vision, parts.conv_norm)
        else:
            self.vision = CLIPViT(vision)
            parts.prepare(self.vision)
        self.bridger = self._make_bridger(parts.bridger)
        self.neck = self._make_neck(parts.neck)
        self.decoder = parts.decoder(
            config.decoder_layers, text.hidden_size, config.decoder_heads, config.decoder_hidden, config.decoder_dropout
        )
        self.projector = parts.projector(text.projection_dim, text.hidden_size, config.mask_width)
        if self.has("dead_parameters"):
            self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        for tower in (self.text, self.vision):
            for module in tower.modules():
                if hasattr(module, "recompute"):
                    module.recompute = config.recompute
        self.finish()

    def _make_bridger(self, kind: type[Bridger]) -> Bridger:
        config, vision = self.config, self.config.vision_config
        make, width = (kind.resnet, vision.channels[1:]) if config.is_resnet else (kind.vit, vision.hidden_size)
        return make(
            width,
            config.text_config.hidden_size,
            config.ladder_dim,
            config.bridge_heads,
            interaction=config.interaction,
            dropout=config.bridge_dropout,
            recompute=False,  # its dropout could not be captured in a CUDA graph
        )

    def _make_neck(self, kind: type[Neck]) -> Neck:
        vision, text = self.config.vision_config, self.config.text_config
        if self.config.is_resnet:
            channels, strides = (*vision.channels[1:3], vision.projection_dim), (2, 1, 2)
        else:
            channels, strides = (vision.hidden_size, vision.hidden_size, vision.projection_dim), (1, 1, 1)
        dead = self.has("dead_parameters")
        return kind(channels, strides, text.projection_dim, text.hidden_size, dead=dead)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HierarchicalAlignment):
            for gate in module.gates:  # a third of a packed weight, as nn.MultiheadAttention draws it
                nn.init.xavier_uniform_(gate.v_proj.weight, gain=0.5**0.5)
                nn.init.zeros_(gate.v_proj.bias)
                nn.init.zeros_(gate.out_proj.bias)
        if isinstance(module, Bridger):
            for name, parameter in module.named_parameters():
                if fnmatchcase(name, "*.zoom.*ward.weight"):
                    nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=0.02)
                    nn.init.zeros_(part.bias)

    def tuned(self) -> Iterator[nn.Module]:
        if self.config.is_resnet and not self.has("random_shortcut"):
            yield self.vision.attnpool.connect

    def freeze(self) -> None:
        super().freeze()
        freeze_position_embeddings(self, frozen=not self.has("trained_positions"))
        if self.has("dead_parameters"):
            self.logit_scale.requires_grad_(False)

    def train(self, mode: bool = True) -> ETRISForSegmentation:
        """As every method's; with "batch_statistics" the image tower is in training mode, too."""
        super().train(mode)
        if self.finished and self.has("batch_statistics"):
            self.vision.train(mode)
        return self

    def adapters(self) -> dict[str, Tensor]:
        """The tuned part, and what of the ResNet is no checkpoint's: a shortcut that was drawn, statistics that drift."""
        options = {"random_shortcut": "vision.attnpool.connect.*", "batch_statistics": "vision.*.running_*"}
        patterns = [pattern for option, pattern in options.items() if self.has(option)]
        state = self.state_dict()
        own = {name: tensor for name, tensor in state.items() if any(fnmatchcase(name, p) for p in patterns)}
        return own | super().adapters()

    def fitted(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        key, own = "vision_model.embeddings.position_embedding.weight", getattr(self, name).state_dict()
        if key in state and key in own and state[key].shape != own[key].shape:
            state[key] = resized(state[key], (self.config.grid, self.config.grid))
        return state

    @torch.no_grad()
    def load_openai(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take both towers' weights from the state dict of a CLIP model that OpenAI released.

        Raises:
            ValueError: a tensor of a tower is missing, or has another shape; then nothing is taken.
        """
        found = {name: self.fitted(name, state) for name, state in from_openai(state_dict).items()}
        for name, state in found.items():
            own = {key: t for key, t in getattr(self, name).state_dict().items() if "attnpool.connect" not in key}
            for key, tensor in own.items():
                if key not in state and not key.endswith("num_batches_tracked"):
                    fail(f"{name}.{key}", "a tensor in state_dict", "none")
                if key in state and state[key].shape != tensor.shape:
                    fail(f"{name}.{key}", f"shape {tuple(tensor.shape)}", f"shape {tuple(state[key].shape)}")
        for name, state in found.items():
            own = getattr(self, name).state_dict()
            for key in own.keys() & state.keys():
                own[key].copy_(state[key])

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SegmentationOutput:
        """The mask of each pair of an image and a sentence, and its loss where the true masks are given.

        Args:
            pixel_values: (B, 3, image_size, image_size).
            pixel_mask: not read: to ETRIS the border of a letterbox is part of the image.
            input_ids: (B, text_length); the largest id ends the sentence, as in CLIP's vocabulary.
            attention_mask: (B, text_length), 1 for words and 0 for padding; id 0 is padding by default.
            labels: (B, image_size, image_size), the masks, 1 or True inside.

        Raises:
            ValueError: a tensor of another shape.
        """
        size, batch = self.config.image_size, len(pixel_values)
        self.check_inputs(pixel_values, input_ids=input_ids)
        padding = (input_ids if attention_mask is None else attention_mask) == 0
        ends = self.config.bridge_blocks
        levels, text = self.bridger(
            self.vision.start(pixel_values),
            self.text.text_model.embeddings(input_ids),
            self.vision.pieces(ends),
            text_pieces(self.text, ends),
            padding if self.config.mask_padding else None,
        )
        words = self.text.text_model.final_layer_norm(text)
        samples = torch.arange(batch, device=words.device)
        sentence = self.text.text_projection(words[samples, input_ids.argmax(-1)])
        fused = self.decoder(self.neck(self.vision.maps(levels), sentence), words, padding)
        logits = self.projector(fused, sentence)
        if labels is None:
            return SegmentationOutput(logits=logits)
        labels = labels.to(torch.promote_types(logits.dtype, torch.float32))
        check_tensor("labels", labels, (batch, size, size), logits.device)
        loss = mask_loss(logits, F.interpolate(labels[:, None], logits.shape[2:]))
        return SegmentationOutput(loss=loss, logits=logits, losses={"bce": loss})
