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
    "LoraLinear": "fastadapt.modules.lora",
    "PhiloxDropout": "fastadapt.modules.lora",
    "BottleneckAdapter": "fastadapt.modules.adapters",
    "DynamicPriorAdapter": "fastadapt.modules.adapters",
    "PriorGuidedText": "fastadapt.modules.adapters",
    "LoCA": "fastadapt.modules.loca",
    "SideAdapter": "fastadapt.modules.side",
    "CrossModalBridge": "fastadapt.modules.cross_modal",
    "CrossModalBridges": "fastadapt.modules.cross_modal",
    "Bridger": "fastadapt.modules.bridger",
    "HierarchicalAlignment": "fastadapt.modules.alignment",
    "GlobalAlignment": "fastadapt.modules.alignment",
    "Projector": "fastadapt.modules.projector",
    "LocalConvAdapter": "fastadapt.modules.local_conv",
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
