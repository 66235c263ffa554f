"""HiVG's configuration: its presets, and where its release departs from the paper."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from fastadapt.core.checks import fail
from fastadapt.models.common.base import MethodConfig
from fastadapt.models.common.parity import Parity

PARITY = (
    Parity(
        "mixed_batch",
        "a bridge attends to the words of its own sample",
        "slot s of sample b is word i of sample j, (i, j) = divmod(b T + s, B), so samples mix and nothing is masked",
    ),
    Parity("raw_text_states", "text states are normalised in front of the gate", "they are not"),
    Parity("padding_words", "bridges attend to no padding word", "they attend to all T words"),
    Parity(
        "single_pair",
        "a stage adds a pair to each LoRA and freezes the earlier ones",
        "there is one pair, which every stage trains on",
    ),
    Parity("bridge_lora", "the bridges' projections are trained", "they are trained and have LoRA too"),
    Parity("frozen_lora_dropout", "frozen LoRA is a constant part of its weight", "its dropout is active in training"),
    Parity("auxiliary_heads_at_test", "without boxes given the box is all that is computed", "the auxiliary outputs are, too"),
    Parity("dead_parameters", "left out", "two projections and two embeddings, which nothing runs"),
)

_BASE = {
    "vision_config": {"patch_size": 16},
    "text_config": {},
    "fusion_width": 512,
    "bridged_blocks": (0, 3, 7, 11),
    "visual_levels": (1, 4, 8, 12),
}
_LARGE = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "fusion_width": 768,
    "bridged_blocks": (4, 10, 16, 22),
    "visual_levels": (6, 12, 18, 24),
}
_DATA = {
    "refcoco": {"text_layers": (12,)},
    "refcoco+": {"text_layers": (6, 12)},
    "refcocog": {"text_layers": tuple(range(1, 13))},
    "referit": {"text_layers": (6, 12)},
    "flickr": {"text_layers": (12,)},
    "mixup": {"text_layers": (), "mixup": True},
}
_TINY = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    },
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "projection_dim": 16,
        "bos_token_id": 62,
        "eos_token_id": 63,
    },
    "text_length": 8,
    "text_layers": (2, 3),
    "bridged_blocks": (0, 2),
    "visual_levels": (1, 2, 4),
    "stage": 2,
    "stage_blocks": (0, 2, 3),
    "lora_rank": 4,
    "lora_alpha": 4.0,
    "fusion_width": 16,
    "fusion_hidden": 32,
    "fusion_heads": 2,
    "fusion_layers": 2,
    "token_hidden": 32,
}


class HiVGConfig(MethodConfig):
    """What HiVG is made of.

    vision_config, text_config: of CLIP's two towers; ViT-B/16's by default.  Images are of vision_config.image_size.
    text_length: the most words of a sentence, padding included.
    text_layers: after how many text blocks, each, a state goes to the bridges.
    bridged_blocks: the image blocks, counted from 0, that have a bridge; none for HiVG without bridges.
    visual_levels: after how many image blocks, each, a state goes to the fusion.
    mixup: the pre-training on mixed data sets, in which the bridges read one projection of CLIP's word features.
    bridge_zero_init: bridges start as the identity.
    stage: of the training, 0 (no LoRA trains) to len(stage_blocks) - 1; `HiVGForGrounding.advance_stage` sets it.
    stage_blocks: how many image blocks, from the first, have their LoRA trained at each stage; from stage 1 all text blocks
        have.  The paper's groups are (0, 4, 8, 12).
    lora_rank, lora_alpha, lora_dropout: of one pair of matrices.
    fusion_width, fusion_hidden, fusion_heads, fusion_layers, fusion_dropout: of the fusion encoder; its width is that of
        CLIP's common space.
    token_hidden: hidden width of the head that compares image tokens with the sentence.
    recompute: in the fastadapt arm, compute CLIP's blocks without a bridge and the fusion's layers again in the backward.
    """

    model_type = "hivg"
    sub_configs_defaults = {"vision_config": CLIPVisionConfig, "text_config": CLIPTextConfig}
    PARITY: ClassVar[tuple[Parity, ...]] = PARITY
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **{
            f"{size}-{data}-stage{stage}": {**of_size, **of_data, "stage": stage}
            for size, of_size in {"base": _BASE, "large": _LARGE}.items()
            for data, of_data in _DATA.items()
            for stage in range(4)
        },
        "tiny": _TINY,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    text_length: int = 77
    text_layers: list[int] | tuple[int, ...] = (12,)
    bridged_blocks: list[int] | tuple[int, ...] = (0, 3, 7, 11)
    visual_levels: list[int] | tuple[int, ...] = (1, 4, 8, 12)
    mixup: bool = False
    bridge_zero_init: bool = False
    stage: int = 0
    stage_blocks: list[int] | tuple[int, ...] = (0, 5, 8, 12)
    lora_rank: int = 32
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    fusion_width: int = 512
    fusion_hidden: int = 2048
    fusion_heads: int = 8
    fusion_layers: int = 6
    fusion_dropout: float = 0.1
    token_hidden: int = 3072
    recompute: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = dict(_BASE["vision_config"])
        for name in ("text_layers", "bridged_blocks", "visual_levels", "stage_blocks"):
            setattr(self, name, list(getattr(self, name)))  # as they come from a file
        super().__post_init__(**kwargs)
        vision, text = self.vision_config, self.text_config
        if vision.image_size % vision.patch_size:
            fail("vision_config.image_size", f"a multiple of patch_size = {vision.patch_size}", vision.image_size)
        for name, config in (("vision_config", vision), ("text_config", text)):
            if config.projection_dim != self.fusion_width:
                fail(f"{name}.projection_dim", f"fusion_width = {self.fusion_width}", config.projection_dim)
        if not 1 <= self.text_length <= text.max_position_embeddings:
            fail("text_length", f"1 to {text.max_position_embeddings}", self.text_length)
        if self.mixup == bool(self.text_layers):
            fail("text_layers", "none with mixup" if self.mixup else "at least one layer", self.text_layers)
        _check_ascending("text_layers", self.text_layers, 0, text.num_hidden_layers)
        _check_ascending("bridged_blocks", self.bridged_blocks, 0, vision.num_hidden_layers - 1)
        _check_ascending("visual_levels", self.visual_levels, 0, vision.num_hidden_layers)
        _check_ascending("stage_blocks", self.stage_blocks, 0, vision.num_hidden_layers)
        if self.stage_blocks[:1] != [0]:
            fail("stage_blocks", "0 blocks at stage 0", self.stage_blocks)
        if not 0 <= self.stage < len(self.stage_blocks):
            fail("stage", f"0 to {len(self.stage_blocks) - 1}", self.stage)

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.vision_config.image_size

    @property
    def grid(self) -> int:
        """Image tokens down and across."""
        return self.image_size // self.vision_config.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that are fused: REG, CLS, image, words."""
        return 2 + self.grid**2 + self.text_length

    def first_stage(self, block: int) -> int | None:
        """The stage at which the LoRA of this image block begins to train; None for never."""
        return next((stage for stage, blocks in enumerate(self.stage_blocks) if block < blocks), None)


def _check_ascending(name: str, values: list[int], least: int, most: int) -> None:
    if values != sorted(set(values)) or (values and not (least <= values[0] and values[-1] <= most)):
        fail(name, f"ascending numbers from {least} to {most}", values)
