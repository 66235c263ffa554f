"""ETRIS's configuration: its presets, and where its release departs from the paper."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from fastadapt.core.checks import fail
from fastadapt.models.common.base import MethodConfig
from fastadapt.models.common.parity import Parity

PARITY = (
    Parity("trained_positions", "frozen as the rest of CLIP", "both towers' position embeddings train, at their inputs"),
    Parity("batch_statistics", "CLIP's ResNet normalises by its own statistics", "by the batch's, and its own drift"),
    Parity("random_shortcut", "the attention pool's shortcut, which CLIP has not, trains", "it stays as it was drawn"),
    Parity("dead_parameters", "left out", "the gates' queries and keys, whose gradient is zero, and CLIP's logit scale"),
)


class CLIPResNetConfig(PreTrainedConfig):
    """Of `CLIPResNet`; CLIP's RN50 by default.

    layers: blocks of each of the four stages; their outputs have 4, 8, 16 and 32 times `width` channels.
    width: channels of the stem.
    num_attention_heads, projection_dim: of the attention pool, and of what comes out of it.
    positions: the attention pool's position embedding is for a map of positions x positions, and is resized to others.
    image_size: height and width of the images, a multiple of 32.
    """

    model_type = "clip_resnet"
    base_config_key = "vision_config"

    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_attention_heads: int = 32
    projection_dim: int = 1024
    positions: int = 7
    image_size: int = 224

    def __post_init__(self, **kwargs: Any) -> None:
        self.layers = list(self.layers)  # as they come from a file
        super().__post_init__(**kwargs)
        if len(self.layers) != 4 or min(self.layers) < 1:
            fail("layers", "four positive numbers", self.layers)
        if 32 * self.width % self.num_attention_heads:
            fail("num_attention_heads", f"a divisor of {32 * self.width}", self.num_attention_heads)

    @property
    def channels(self) -> list[int]:
        """Of the four stages' outputs."""
        return [self.width * 4 * 2**stage for stage in range(4)]


_FULL = {"interaction": "full", "bridge_heads": 4}
_TOWERS = {
    "vit-b": {"vision_config": {"patch_size": 16, "image_size": 416}},
    "r50": {
        "vision_config": {"model_type": "clip_resnet", "image_size": 416},
        "text_config": {"projection_dim": 1024},
        **_FULL,
    },
    "r101": {
        "vision_config": {
            "model_type": "clip_resnet",
            "layers": (3, 4, 23, 3),
            "projection_dim": 512,
            "image_size": 416,
        },
        **_FULL,
    },
}
_LADDERS = {"": {}, "-ladder128": {"ladder_dim": 128}}
_DATA = {"": {}, "-refcocog": {"text_length": 22}}
_TINY = {
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "projection_dim": 16,
        "bos_token_id": 62,
        "eos_token_id": 63,
    },
    "text_length": 6,
    "bridge_blocks": (1, 2, 3),
    "ladder_dim": 16,
    "bridge_heads": 2,
    "decoder_layers": 2,
    "decoder_heads": 4,
    "decoder_hidden": 32,
    "mask_width": 16,
}
_TINY_VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 16,
    "projection_dim": 16,
}
_TINY_RESNET = {
    "model_type": "clip_resnet",
    "layers": (1, 1, 2, 1),
    "width": 8,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "positions": 3,
    "image_size": 64,
}


class ETRISConfig(MethodConfig):
    """What ETRIS is made of.

    vision_config: a CLIPVisionConfig, that of CLIP ViT-B/16 at 416 pixels by default, or a CLIPResNetConfig.
    text_config: a CLIPTextConfig; that of CLIP ViT-B/16 by default.  Its hidden size is the decoder's width.
    text_length: number of words, padding included.
    bridge_blocks: after how many text blocks each stage of the Bridger comes, the last after all; in a ViT after as many of its
        own, in a ResNet after its second, third and fourth stage.
    ladder_dim, bridge_heads, interaction, bridge_dropout: of `fastadapt.Bridger`; dropout is in the full interaction alone.
    mask_padding: whether the Bridger attends to no padding word; the released model attends to all.
    decoder_layers, decoder_heads, decoder_hidden, decoder_dropout: of `fastadapt.GlobalAlignment`.
    mask_width: channels of the map that the sentence's kernel reads.
    recompute: in the fastadapt arm, compute the transformers' blocks again in the backward.
    """

    model_type = "etris"
    sub_configs_defaults = {"vision_config": CLIPVisionConfig, "text_config": CLIPTextConfig}
    PARITY: ClassVar[tuple[Parity, ...]] = PARITY
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        **{
            f"{tower}{ladder}{data}": {**of_tower, **of_ladder, **of_data}
            for tower, of_tower in _TOWERS.items()
            for ladder, of_ladder in _LADDERS.items()
            for data, of_data in _DATA.items()
        },
        "tiny": {**_TINY, "vision_config": _TINY_VIT},
        "tiny-resnet": {**_TINY, "vision_config": _TINY_RESNET, **_FULL},
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    text_length: int = 17
    bridge_blocks: list[int] | tuple[int, ...] = (4, 8, 12)
    ladder_dim: int = 64
    bridge_heads: int = 8
    interaction: str = "light"
    bridge_dropout: float = 0.1
    mask_padding: bool = False
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_hidden: int = 512
    decoder_dropout: float = 0.1
    mask_width: int = 256
    recompute: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        vision = _TOWERS["vit-b"]["vision_config"] if self.vision_config is None else self.vision_config
        if isinstance(vision, dict) and vision.get("model_type") == CLIPResNetConfig.model_type:
            vision = CLIPResNetConfig(**vision)
        self.vision_config, self.bridge_blocks = vision, list(self.bridge_blocks)  # as they come from a file
        super().__post_init__(**kwargs)
        vision, text = self.vision_config, self.text_config
        stride = 32 if self.is_resnet else vision.patch_size
        if vision.image_size % stride:
            fail("vision_config.image_size", f"a multiple of {stride}", vision.image_size)
        if not 1 <= self.text_length <= text.max_position_embeddings:
            fail("text_length", f"1 to {text.max_position_embeddings}", self.text_length)
        ends, blocks = self.bridge_blocks, text.num_hidden_layers
        if len(ends) != 3 or ends != sorted(set(ends)) or ends[0] < 1 or ends[-1] != blocks:
            fail("bridge_blocks", f"three ascending positive numbers, the last {blocks}, all text blocks", ends)
        if not self.is_resnet and vision.num_hidden_layers != blocks:
            fail("vision_config.num_hidden_layers", f"{blocks}, as many as the text tower has", vision.num_hidden_layers)

    @property
    def is_resnet(self) -> bool:
        """Whether the image tower is CLIP's ResNet."""
        return isinstance(self.vision_config, CLIPResNetConfig)

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.vision_config.image_size

    @property
    def grid(self) -> int:
        """Places of the decoder down and across; the mask has four times as many."""
        return self.image_size // (16 if self.is_resnet else self.vision_config.patch_size)
