"""HiLoRA as an adapter of PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastadapt import HiLoraLinear


def write_peft(directory: str | Path, linears: Mapping[str, HiLoraLinear], dropout: float) -> Path:
    """Write adapter_config.json and adapter_model.safetensors: the pairs in use of each linear as one of their ranks' sum.

        s sum_k B_k A_k = s [B_1 | B_2 | ...] [A_1; A_2; ...],      s = alpha / r = (k alpha) / (k r)
    """
    used = {name: linear for name, linear in linears.items() if linear.used}
    tensors: dict[str, Tensor] = {}
    for name, linear in used.items():
        path = f"base_model.model.{name}"
        tensors[f"{path}.lora_A.weight"] = torch.cat([pair.lora_A.detach() for pair in linear.used])
        tensors[f"{path}.lora_B.weight"] = torch.cat([pair.lora_B.detach() for pair in linear.used], 1)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(_config(used, dropout), indent=2) + "\n")
    return folder


def _config(linears: Mapping[str, HiLoraLinear], dropout: float) -> dict[str, Any]:
    counts = {name: len(linear.used) for name, linear in linears.items()}
    one = next(iter(linears.values()), None)
    rank, alpha = (1, 1.0) if one is None else (one.r, one.lora_alpha)
    several = {name: count for name, count in counts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(linears),
        "rank_pattern": {name: count * rank for name, count in several.items()},
        "alpha_pattern": {name: count * alpha for name, count in several.items()},
    }
