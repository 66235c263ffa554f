"""M2IST's configuration: its presets, and where its release departs from the paper."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import BertConfig, DetrConfig, PreTrainedConfig

from fastadapt.core.checks import fail
from fastadapt.models.common.base import MethodConfig
from fastadapt.models.common.parity import Parity

PARITY = (
    Parity("bert_double_norm", "stock BERT", "residual and LayerNorm twice in the tapped layers, LN(LN(y + x) + x)"),
    Parity("no_token_types", "stock BERT", "BERT's token type embedding is not added"),
    Parity("tower_dropout", "frozen towers run in eval mode", "their dropout is active in training"),
    Parity("uniform_vision_biases", "zero", "the vision side's biases start from U(0, 1)"),
    Parity("dead_parameters", "left out", "a second LayerNorm in every expert and two LoRA modules, which nothing runs"),
)

# DETR-R50: every dropout of the original is 0.1
_DETR = {
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
}

_TINY = {
    "vision_config": {
        "backbone_config": {
            "model_type": "resnet",
            "out_features": ["stage4"],
            "embedding_size": 8,
            "hidden_sizes": [16, 24, 32, 48],
            "depths": [1, 1, 1, 1],
        },
        "d_model": 16,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
    },
    "text_config": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    },
    "image_size": 96,
    "text_length": 6,
    "side_layers": 3,
    "bottleneck": 8,
    "fusion_hidden": 32,
    "fusion_heads": 2,
    "fusion_layers": 2,
}


class M2ISTConfig(MethodConfig):
    """What M2IST is made of.

    vision_config: a DetrConfig whose backbone is a transformers ResNet; DETR-R50 by default.
    text_config: a BertConfig; BERT-base by default.
    image_size: height and width of the images, a multiple of 32.
    text_length: number of words, padding included.
    side_layers: how many layers, from the first, of each tower have side adapters.
    bottleneck: hidden width of every side adapter.
    fusion_hidden, fusion_heads, fusion_layers, fusion_dropout: of the fusion encoder, whose width is the vision tower's.
    """

    model_type = "m2ist"
    sub_configs_defaults = {"vision_config": DetrConfig, "text_config": BertConfig}
    PARITY: ClassVar[tuple[Parity, ...]] = PARITY
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "refcoco": {},
        "refcoco+": {},
        "refcocog": {"text_length": 40},
        "tiny": _TINY,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_size: int = 640
    text_length: int = 20
    side_layers: int = 6
    bottleneck: int = 128
    fusion_hidden: int = 2048
    fusion_heads: int = 8
    fusion_layers: int = 6
    fusion_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = dict(_DETR)
        super().__post_init__(**kwargs)
        if self.image_size % 32:
            fail("image_size", "a multiple of 32", self.image_size)
        layers = min(self.vision_config.encoder_layers, self.text_config.num_hidden_layers)
        if not 1 <= self.side_layers <= layers:
            fail("side_layers", f"1 to {layers}, as many as the towers have", self.side_layers)

    @property
    def grid(self) -> int:
        """Visual tokens down and across."""
        return self.image_size // 32

    @property
    def tokens(self) -> int:
        """Tokens that are fused: REG, words, places."""
        return 1 + self.text_length + self.grid**2
