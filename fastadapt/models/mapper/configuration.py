"""MaPPER's configuration: its presets, and where its release departs from the paper."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import BertConfig, CLIPTextConfig, Dinov2Config, PreTrainedConfig

from fastadapt.core.checks import fail
from fastadapt.models.common.base import MethodConfig
from fastadapt.models.common.parity import Parity

PARITY = (
    Parity("additive_mask", "in the fusion padded keys are left out", "1 is added to the scores of padded keys"),
    Parity("bert_ids_for_prior", "the prior reads CLIP's ids, `prior_ids`", "it reads BERT's ids in CLIP's vocabulary"),
    Parity("no_token_types", "stock BERT", "BERT's token type embedding is not added"),
    Parity("tower_dropout", "frozen towers run in eval mode", "their dropout is active in training"),
    Parity("normal_dypa", "DyPA's last linear starts at zero", "DyPA's linears start from N(0, 0.02), their biases at zero"),
    Parity("dead_parameters", "left out", "a linear of the prior in every DyPA, which nothing runs"),
)

_TINY = {
    "vision_config": {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "mlp_ratio": 2,
        "image_size": 40,
        "patch_size": 8,
    },
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    },
    "prior_config": {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "projection_dim": 16,
        "bos_token_id": 94,
        "eos_token_id": 95,
    },
    "text_length": 6,
    "adapted_layers": (1, 3),
    "point_channels": 8,
    "reduced_channels": 3,
    "local_channels": 4,
    "bottleneck": 8,
    "fusion_width": 16,
    "fusion_hidden": 32,
    "fusion_heads": 2,
    "fusion_layers": 2,
}


class MaPPERConfig(MethodConfig):
    """What MaPPER is made of.

    vision_config: a Dinov2Config; ViT-B/14 at 518 pixels by default.  Images are of vision_config.image_size.
    text_config: a BertConfig; BERT-base by default.
    prior_config: a CLIPTextConfig; that of CLIP ViT-B/16 by default.
    text_length: number of words, padding included.
    adapted_layers: the layers, counted from 0, that have an adapter, LoCA in the image tower and DyPA in the text tower.
    point_channels, reduced_channels, local_channels: of LoCA's convolutions.
    bottleneck: hidden width of DyPA.
    fusion_width, fusion_hidden, fusion_heads, fusion_layers, fusion_dropout: of the fusion encoder.
    recompute: whether, in the fastadapt arm, the fusion encoder and the image blocks without an adapter are run anew in the
        backward: 89 MiB a sample are kept in place of 234 in bfloat16, for a fifth more operations.
    """

    model_type = "mapper"
    sub_configs_defaults = {"vision_config": Dinov2Config, "text_config": BertConfig, "prior_config": CLIPTextConfig}
    PARITY: ClassVar[tuple[Parity, ...]] = PARITY
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "refcoco": {},
        "refcoco+": {},
        "refcocog": {"text_length": 40},
        "tiny": _TINY,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    prior_config: dict | PreTrainedConfig | None = None
    text_length: int = 20
    adapted_layers: list[int] | tuple[int, ...] = (3, 7, 11)
    point_channels: int = 192
    reduced_channels: int = 24
    local_channels: int = 96
    bottleneck: int = 32
    fusion_width: int = 256
    fusion_hidden: int = 2048
    fusion_heads: int = 8
    fusion_layers: int = 6
    fusion_dropout: float = 0.1
    recompute: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = {"image_size": 518}
        self.adapted_layers = list(self.adapted_layers)  # as they come from a file
        super().__post_init__(**kwargs)
        vision, text, prior = self.vision_config, self.text_config, self.prior_config
        if vision.image_size % vision.patch_size:
            fail("vision_config.image_size", f"a multiple of patch_size = {vision.patch_size}", vision.image_size)
        for name, wanted in (("use_swiglu_ffn", False), ("drop_path_rate", 0.0), ("hidden_act", "gelu")):
            if getattr(vision, name) != wanted:
                fail(f"vision_config.{name}", wanted, getattr(vision, name))
        if text.hidden_act != "gelu":
            fail("text_config.hidden_act", "gelu", text.hidden_act)
        longest = min(text.max_position_embeddings, prior.max_position_embeddings)
        if not 1 <= self.text_length <= longest:
            fail("text_length", f"1 to {longest}", self.text_length)
        layers, last = self.adapted_layers, min(vision.num_hidden_layers, text.num_hidden_layers) - 1
        if not layers or layers != sorted(set(layers)) or not (0 <= layers[0] and layers[-1] <= last):
            fail("adapted_layers", f"ascending numbers from 0 to {last}, at least one", layers)

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.vision_config.image_size

    @property
    def grid(self) -> int:
        """Patches down and across."""
        return self.image_size // self.vision_config.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that are fused: REG, words, CLS, patches."""
        return 2 + self.text_length + self.grid**2
