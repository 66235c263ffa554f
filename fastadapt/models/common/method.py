"""What `fastadapt plan` and the benchmarks need to know of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastadapt.core.checks import fail
from fastadapt.models.common.base import MethodConfig, MethodModel
from fastadapt.models.common.table import Share

# one line a method: the module that has its METHOD
METHODS = {
    "etris": "fastadapt.models.etris.method",
    "hivg": "fastadapt.models.hivg.method",
    "m2ist": "fastadapt.models.m2ist.method",
    "mapper": "fastadapt.models.mapper.method",
}


def grounding_inputs(config: Any, batch: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Images, sentences and boxes drawn at random; the last quarter of each image and of each sentence is padding."""
    size, length = config.image_size, config.text_length
    mask = torch.ones(batch, size, size, dtype=torch.long, device=device)
    mask[:, 3 * size // 4 :] = 0
    words = torch.ones(batch, length, dtype=torch.long, device=device)
    words[:, 3 * length // 4 :] = 0
    return {
        "pixel_values": torch.randn(batch, 3, size, size, device=device),
        "pixel_mask": mask,
        "input_ids": torch.randint(1, config.text_config.vocab_size, (batch, length), device=device),
        "attention_mask": words,
        "labels": torch.rand(batch, 4, device=device) * 0.2 + 0.4,
    }


@dataclass(frozen=True)
class Method:
    """A method: its classes, and how its parameters and its memory are told apart.

    parts: part -> patterns of parameter names; the first part that fits is a parameter's.
    regions: region -> patterns of module names; what is kept for the backward is of the first region that the module which
        keeps it, or one around that, fits.
    shares: the percentages that the paper gives, from a model.
    batch: of the paper's own setting, one GPU.
    preset: which `plan` takes when none is named.
    inputs: inputs(config, batch, device) -> the keyword arguments of a training step's forward.
    """

    config: type[MethodConfig]
    model: type[MethodModel]
    parts: Mapping[str, Sequence[str]]
    regions: Mapping[str, Sequence[str]]
    shares: Callable[[MethodModel], list[Share]]
    batch: int
    preset: str
    inputs: Callable[[Any, int, torch.device | str], dict[str, Tensor]] = grounding_inputs


def method(name: str) -> Method:
    """The method of this name."""
    if name not in METHODS:
        fail("method", f"one of {', '.join(METHODS)}", repr(name))
    return import_module(METHODS[name]).METHOD
