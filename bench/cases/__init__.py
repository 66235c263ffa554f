"""The table of cases: every workload that can be measured, by name."""

from __future__ import annotations

from collections.abc import Iterable

from bench.case import Case
from bench.cases import (
    bottleneck_adapter,
    clip_lora,
    frozen_group,
    light_interaction,
    loca,
    local_conv_adapter,
    local_dwconv,
    lora_linear,
    methods,
    prior_attention,
    side_fusion,
)
from fastadapt.models.common.method import METHODS

# each module: the shapes that a GPU measures, those that a CPU can, and the case of a shape
OPERATIONS = {
    "lora_linear": lora_linear,
    "bottleneck_adapter": bottleneck_adapter,
    "prior_attention": prior_attention,
    "light_interaction": light_interaction,
    "local_dwconv": local_dwconv,
    "local_conv_adapter": local_conv_adapter,
    "loca": loca,
    "side_fusion": side_fusion,
    "frozen_group": frozen_group,
}
# the settings of clip_lora; a CPU gets fewer images
CLIP = {
    "cuda": (
        ("bfloat16", 32),
        ("float32 under bfloat16 autocast", 32),
        ("bfloat16", 32, "quick_gelu", 1370),
        ("float32 under bfloat16 autocast", 32, "quick_gelu", 1370),
    ),
    "cpu": (("float32", 4),),
}


def operation_cases(device: str, operations: Iterable[str] = OPERATIONS) -> dict[str, Case]:
    """The cases of single operations for "cuda" or "cpu", by name; a CPU gets fewer rows."""
    modules = [OPERATIONS[operation] for operation in operations]
    return {
        shape.name: module.case(shape)
        for module in modules
        for shape in (module.SHAPES if device == "cuda" else module.REDUCED_SHAPES)
    }


def model_cases(device: str) -> dict[str, Case]:
    """The training steps that the main job measures on "cuda" or "cpu", by name."""
    return {case.name: case for case in (clip_lora.case(*setting) for setting in CLIP[device])}


def method_cases(device: str, names: Iterable[str] = METHODS) -> dict[str, Case]:
    """The training steps of methods for "cuda" or "cpu", by name."""
    return {case.name: case for case in (methods.case(name, device) for name in names)}


def find(name: str) -> Case:
    """The case of that name.

    Raises ValueError with the names there are.
    """
    cases = {
        name: case
        for device in CLIP
        for table in (operation_cases, model_cases, method_cases)
        for name, case in table(device).items()
    }
    if name not in cases:
        raise ValueError("case: expected one of\n  " + "\n  ".join(cases) + f"\ngot {name!r}")
    return cases[name]
