"""fastadapt: fused kernels and drop-in modules for parameter-efficient tuning of frozen vision-language models.

Importing this package loads neither triton nor the C++ extension, creates no CUDA context and prints nothing; each public name
below is imported from its module the first time it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "lora_linear": "fastadapt.kernels.lora_linear.op",
    "lora_linear_group": "fastadapt.kernels.lora_linear.op",
    "lora_linear_path": "fastadapt.kernels.lora_linear.op",
    "bottleneck_adapter": "fastadapt.kernels.bottleneck_adapter.op",
    "prior_attention": "fastadapt.kernels.prior_attention.op",
    "light_interaction": "fastadapt.kernels.light_interaction.op",
    "loca": "fastadapt.kernels.loca.op",
    "local_dwconv": "fastadapt.kernels.local_dwconv.op",
    "local_conv_adapter": "fastadapt.kernels.local_conv_adapter.op",
    "local_conv_adapter_path": "fastadapt.kernels.local_conv_adapter.op",
    "SideTap": "fastadapt.kernels.side_fusion.op",
    "side_fusion": "fastadapt.kernels.side_fusion.op",
    "frozen_group": "fastadapt.kernels.frozen_group.op",
    "LoraLinear": "fastadapt.modules.lora",
    "PhiloxDropout": "fastadapt.modules.lora",
    "HiLoraLinear": "fastadapt.modules.hilora",
    "LoraPair": "fastadapt.modules.hilora",
    "BottleneckAdapter": "fastadapt.modules.adapters",
    "DynamicPriorAdapter": "fastadapt.modules.adapters",
    "PriorGuidedText": "fastadapt.modules.adapters",
    "LoCA": "fastadapt.modules.loca",
    "SideAdapter": "fastadapt.modules.side",
    "SideAdapterBank": "fastadapt.modules.bank",
    "SideLadder": "fastadapt.modules.bank",
    "CrossModalBridge": "fastadapt.modules.cross_modal",
    "CrossModalBridges": "fastadapt.modules.cross_modal",
    "Bridger": "fastadapt.modules.bridger",
    "HierarchicalAlignment": "fastadapt.modules.alignment",
    "GlobalAlignment": "fastadapt.modules.alignment",
    "Projector": "fastadapt.modules.projector",
    "LocalConvAdapter": "fastadapt.modules.local_conv",
    "SegmentationHead": "fastadapt.modules.segmentation",
    "SentenceCache": "fastadapt.modules.sentence_cache",
    "trim_padding": "fastadapt.modules.padding",
    "merged": "fastadapt.modules.merging",
    "freeze_position_embeddings": "fastadapt.modules.freezing",
    "compile_frozen": "fastadapt.modules.freezing",
    "graph_step": "fastadapt.modules.graph",
    "FusionEncoder": "fastadapt.modules.fusion_encoder",
    "fold_frozen_batch_norms": "fastadapt.modules.frozen_norms",
    "FrozenBlock": "fastadapt.modules.frozen",
    "fuse": "fastadapt.modules.inject",
    "unfuse": "fastadapt.modules.inject",
    "explain": "fastadapt.modules.inject",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
