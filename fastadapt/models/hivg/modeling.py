"""HiVG's model: one definition, whose parts each arm chooses from a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel
from transformers import initialization as init

from fastadapt import FusionEncoder, HiLoraLinear, SegmentationHead, fuse
from fastadapt.core.checks import check_tensor, fail
from fastadapt.models.common.arms import ATTENTION
from fastadapt.models.common.base import GroundingOutput, MethodModel
from fastadapt.models.common.fusion import EagerFusionEncoder, ReleasedFusionEncoder
from fastadapt.models.common.heads import BoxHead
from fastadapt.models.hivg.bridges import Bridges, EagerBridges, ReleasedBridges
from fastadapt.models.hivg.configuration import HiVGConfig
from fastadapt.models.hivg.export import write_peft
from fastadapt.models.hivg.heads import EagerSegmentationHead, EagerTokenHead, ReleasedSegmentationHead, TokenHead
from fastadapt.models.hivg.losses import WEIGHTS, grounding_losses
from fastadapt.models.hivg.release import DeadModules
from fastadapt.models.hivg.towers import BridgedLayer, FusedBridgedLayer, image_states, release, text_states

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Parts(NamedTuple):
    """What an arm is made of."""

    bridges: type[Bridges]
    bridged_layer: type[BridgedLayer]
    fusion: Callable[..., nn.Module]
    token_head: type[TokenHead]
    segmentation: type[SegmentationHead]
    prepare: Callable[[nn.Module], object]  # of CLIP


PARTS = {
    "release": Parts(
        ReleasedBridges, BridgedLayer, ReleasedFusionEncoder, EagerTokenHead, ReleasedSegmentationHead, release
    ),
    "strong": Parts(EagerBridges, BridgedLayer, EagerFusionEncoder, EagerTokenHead, EagerSegmentationHead, lambda clip: None),
    "fastadapt": Parts(Bridges, FusedBridgedLayer, FusionEncoder, TokenHead, SegmentationHead, fuse),
}


@dataclass
class HiVGOutput(GroundingOutput):
    """GroundingOutput, and where boxes were given what the auxiliary losses are about.

    token_similarity: (B, 1, grid, grid), logits of the image's tokens.
    mask_logits: (B, 1, 8 grid, 8 grid).
    text_embeds, image_embeds: (B, width), CLIP's, of length 1.
    """

    token_similarity: Tensor | None = None
    mask_logits: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class HiVGForGrounding(MethodModel):
    """The box of what a sentence names in an image (Xiao et al., "HiVG", arXiv 2404.13400, ACM MM 2024).

        h_l = block_l(h_{l-1}), with a bridge to the text's states inside of some (`fastadapt.CrossModalBridges`)
        V = W_v concat_l(h_l) + b_v over four levels l,      T = LN(g) P_t,      g the last text state
        y = fusion([REG | V W_1 | T W_2]),      box = head(y_REG)

    CLIP is frozen but for HiLoRA (`fastadapt.HiLoraLinear`) in the projections of its attentions, which trains in stages: none
    at stage 0, then all text blocks and more image blocks at every stage.

    loss = 2 L1 + 2 (1 - GIoU) + CLC + (20 focal + 2 dice)(tokens' similarity to the sentence) + (20 focal + 2 dice)(mask)
    """

    config_class = HiVGConfig
    towers = {"clip": CLIPModel}
    added = ("*.pairs.*",)

    def __init__(self, config: HiVGConfig) -> None:
        super().__init__(config)
        parts, width = PARTS[config.arm], config.fusion_width
        vision, text = config.tower("vision_config"), config.tower("text_config")
        clip = CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
        clip._attn_implementation = ATTENTION[config.arm]
        self.clip = CLIPModel(clip)
        self._insert_lora()
        for block in config.bridged_blocks:
            self.clip.vision_model.encoder.layers[block].__class__ = parts.bridged_layer
        parts.prepare(self.clip)
        self.bridges = self._make_bridges(parts) if config.bridged_blocks else None
        if config.mixup:
            self.mixup_projection = nn.Linear(text.hidden_size, vision.hidden_size)
        self.levels_projection = nn.Linear(len(config.visual_levels) * vision.hidden_size, width)
        self.visual_projection = nn.Linear(width, width)
        self.text_projection = nn.Linear(width, width)
        self.reg = nn.Embedding(1, width)
        self.positions = nn.Embedding(config.tokens, width)
        self.fusion = parts.fusion(
            width, config.fusion_heads, config.fusion_layers, config.fusion_hidden, config.fusion_dropout, pre_norm=True
        )
        self.head = BoxHead(width)
        self.token_head = parts.token_head(width, config.token_hidden)
        self.segmentation = parts.segmentation(width)
        if self.has("dead_parameters"):
            states = len(config.text_layers)
            self.dead = DeadModules(vision.hidden_size, text.hidden_size, states, config.text_length, config.mixup)
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = config.recompute
        self.finish()

    def _insert_lora(self) -> None:
        config = self.config
        self._lora: list[tuple[int | None, str]] = []  # of each linear with LoRA the first stage that trains it, and its name
        for name, first_stage in (("vision_model", config.first_stage), ("text_model", lambda block: 1)):
            for block, layer in enumerate(self.clip.get_submodule(name).encoder.layers):
                first = first_stage(block)
                later = () if first is None else tuple(range(first, len(config.stage_blocks)))
                pairs = (0,) if self.has("single_pair") else later
                for projection in PROJECTIONS if pairs else ():
                    linear = getattr(layer.self_attn, projection)
                    linear = HiLoraLinear.from_linear(linear, first=pairs, **self._lora_kind())
                    linear.stage = config.stage
                    setattr(layer.self_attn, projection, linear)
                    self._lora.append((first, f"{name}.encoder.layers.{block}.self_attn.{projection}"))

    def _lora_kind(self) -> dict[str, float]:
        config = self.config
        return {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}

    def _make_bridges(self, parts: Parts) -> Bridges:
        config, vision, text = self.config, self.config.vision_config, self.config.text_config
        return parts.bridges(
            len(config.bridged_blocks),
            self._lora_kind() if self.has("bridge_lora") else None,
            dim=vision.hidden_size,
            text_dim=vision.hidden_size if config.mixup else text.hidden_size,
            num_states=max(len(config.text_layers), 1),
            num_tokens=config.text_length,
            num_heads=vision.num_attention_heads,
            mlp_dim=vision.intermediate_size,
            adaptive=not config.mixup,
            text_norm=not (config.mixup or self.has("raw_text_states")),
            parity="released" if self.has("mixed_batch") else None,
            zero_init=config.bridge_zero_init,
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Bridges):
            module.reset_text_parameters()
            for side in module.visual if self.config.bridge_zero_init else ():
                nn.init.zeros_(side.fc2.weight)
                nn.init.zeros_(side.fc2.bias)
        if module is self:
            init.copy_(self.levels_projection.weight, self._tiled_projection())

    def _tiled_projection(self) -> Tensor:
        """How the projection of all levels starts: CLIP's of each."""
        return self.clip.visual_projection.weight.detach().repeat(1, len(self.config.visual_levels))

    @torch.no_grad()
    def load_towers(self, **sources: str | Path) -> None:
        super().load_towers(**sources)
        if sources:
            self.levels_projection.weight.copy_(self._tiled_projection())

    load_towers.__doc__ = MethodModel.load_towers.__doc__

    def lora_linears(self) -> Iterator[tuple[int | None, str, HiLoraLinear]]:
        """Of each linear of CLIP with LoRA the first stage that trains it, its name below `clip`, and itself."""
        for first, name in self._lora:
            yield first, name, self.clip.get_submodule(name)

    def tuned(self) -> Iterator[nn.Module]:
        stage = self.config.stage
        for first, _, linear in self.lora_linears():
            if first is not None and first <= stage:
                yield linear.pairs["0" if self.has("single_pair") else str(stage)]

    def train(self, mode: bool = True) -> HiVGForGrounding:
        super().train(mode)
        if self.finished and self.has("frozen_lora_dropout"):
            for _, _, linear in self.lora_linears():
                linear.pairs.train(mode)
        return self

    def advance_stage(self) -> None:
        """Go on to the next stage of HiLoRA: what the model computes stays the same, and what it trains is the next stage's.

        The optimizer has to be made anew, of `parameter_groups`.

        Raises:
            ValueError: there is no further stage.
        """
        if self.config.stage + 1 >= len(self.config.stage_blocks):
            fail("stage", f"below the last, {len(self.config.stage_blocks) - 1}", self.config.stage)
        self.config.stage += 1
        for _, _, linear in self.lora_linears():
            linear.stage = self.config.stage
            linear.pairs.requires_grad_(False)
        for module in self.tuned():
            module.requires_grad_(True)
        self.train(self.training)

    def merge_stage(self) -> None:
        """Add every pair in use to its weight and set it to zero: CLIP's weights are then this model's own.

        What the model computes stays the same.  `save_adapters` and `save_peft` do not have what was merged; `save_pretrained`
        has.
        """
        for _, _, linear in self.lora_linears():
            linear.merge()

    def adapters(self) -> dict[str, Tensor]:
        """The tuned part: what this stage trains, and the pairs of all stages."""
        pairs = {name: p.detach() for name, p in self.clip.named_parameters(prefix="clip") if ".pairs." in name}
        return {**super().adapters(), **pairs}

    def save_peft(self, directory: str | Path) -> Path:
        """Write CLIP's LoRA, all pairs in use, as an adapter that peft loads onto transformers' CLIPModel; nothing else."""
        linears = {name: linear for _, name, linear in self.lora_linears()}
        return write_peft(directory, linears, self.config.lora_dropout)

    def encode_text(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """CLIP's normalised last state of a sentence and the states that the bridges read, (B, T, width) each.

        At stage 0, where the text tower is frozen, it can be kept for each sentence:

            model.encode_text = fastadapt.SentenceCache(model.clip.text_model, model.encode_text)
        """
        tower = self.clip.text_model
        states = text_states(tower, input_ids)
        return tower.final_layer_norm(states[-1]), *(states[layer] for layer in self.config.text_layers)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mask_labels: Tensor | None = None,
    ) -> HiVGOutput:
        """The box of each pair of an image and a sentence, and its loss where the true boxes are given.

        Args:
            pixel_values: (B, 3, image_size, image_size).
            pixel_mask: (B, image_size, image_size), 1 for image and 0 for padding; no padding by default.
            input_ids: (B, T), T at most text_length (`fastadapt.trim_padding` cuts them, exactly unless parity has
                "padding_words" or "mixed_batch"); the largest of a row is the end of its sentence, which CLIP reads.
            attention_mask: (B, T), 1 for words and 0 for padding; by default ids of 0 are padding.
            labels: (B, 4), centre and size of the box, (cx, cy, w, h), as parts of the padded image.
            mask_labels: (B, image_size, image_size), 1 for what is meant; the box by default.

        Raises:
            ValueError: a tensor of another shape.
        """
        self._check(pixel_values, input_ids)
        size, grid, batch = self.config.image_size, self.config.grid, len(pixel_values)
        padding = input_ids == 0 if attention_mask is None else attention_mask == 0
        last, *states = self.encode_text(input_ids)
        words = self.clip.text_projection(last)
        levels = self._image_states(pixel_values, states, words, padding)
        image = self.levels_projection(torch.cat([levels[level] for level in self.config.visual_levels], -1))
        image, fused_words = self.visual_projection(image), self.text_projection(words)
        tokens = torch.cat([self.reg.weight.to(image.dtype).expand(batch, 1, -1), image, fused_words], 1)
        ignored = torch.cat([self._image_padding(pixel_mask, batch, padding), padding], 1)
        auxiliary = labels is not None or self.has("auxiliary_heads_at_test")
        fused = self.fusion(tokens, self.positions.weight[: tokens.shape[1]], ignored, rows=None if auxiliary else 1)
        boxes = self.head(fused[:, 0])
        if not auxiliary:
            return HiVGOutput(pred_boxes=boxes)
        samples, end = torch.arange(batch, device=boxes.device), input_ids.argmax(-1)
        sentence = F.normalize(fused[samples, 2 + grid**2 + end], dim=-1)
        places = fused[:, 2 : 2 + grid**2]
        similarity = self.token_head(places) @ sentence.to(places.dtype)[:, :, None]
        mask_logits = self.segmentation(places, sentence, (grid, grid))
        image_embeds = self.clip.visual_projection(self.clip.vision_model.post_layernorm(levels[-1][:, 0]))
        output = HiVGOutput(
            pred_boxes=boxes,
            token_similarity=similarity.transpose(1, 2).unflatten(2, (grid, grid)),
            mask_logits=mask_logits,
            text_embeds=F.normalize(words[samples, end], dim=-1),
            image_embeds=F.normalize(image_embeds, dim=-1),
        )
        if labels is not None:
            check_tensor("labels", labels, (batch, 4), boxes.device)
            output["losses"] = grounding_losses(
                boxes, output.token_similarity, mask_logits, output.text_embeds, output.image_embeds, self.clip.logit_scale,
                labels, mask_labels, size,
            )  # fmt: skip
            output["loss"] = sum(WEIGHTS[name] * value for name, value in output.losses.items())
        return output

    def _check(self, pixel_values: Tensor, input_ids: Tensor | None) -> None:
        size, longest = self.config.image_size, self.config.text_length
        check_tensor("pixel_values", pixel_values, (None, 3, size, size), pixel_values.device)
        shape = None if input_ids is None else tuple(input_ids.shape)
        if shape is None or len(shape) != 2 or shape[0] != len(pixel_values) or not 1 <= shape[1] <= longest:
            fail("input_ids", f"shape ({len(pixel_values)}, at most {longest})", shape)

    def _image_states(self, pixel_values: Tensor, states: list[Tensor], words: Tensor, padding: Tensor) -> list[Tensor]:
        bridged = {}
        if self.bridges is not None:
            states = [self.mixup_projection(words)] if self.config.mixup else states
            everything = self.has("padding_words") or self.has("mixed_batch")
            texts = self.bridges(states, None if everything else padding)
            bridged = dict(zip(self.config.bridged_blocks, zip(self.bridges, texts)))
        return image_states(self.clip.vision_model, pixel_values, bridged)

    def _image_padding(self, pixel_mask: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """(B, 2 + places), True for a place that is padding by half at least."""
        grid = self.config.grid
        head = like.new_zeros(batch, 2)
        if pixel_mask is None:
            return torch.cat([head, like.new_zeros(batch, grid**2)], 1)
        padded = F.interpolate((pixel_mask == 0)[:, None].float(), (grid, grid), mode="bilinear", align_corners=False)
        return torch.cat([head, padded.flatten(1) >= 0.5], 1)
