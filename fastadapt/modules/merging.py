"""LoRA merged into its weights for the time of an inference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

from fastadapt.core.checks import fail
from fastadapt.modules.lora import LoraLinear

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def merged(model: Model) -> Iterator[Model]:
    """Run the block with every LoRA layer of the model merged, `LoraLinear` and PEFT's, and take the updates out again exactly.

        W' = W + s B A:      one linear in place of five operations (lora_linear: two)

        with fastadapt.merged(model), torch.inference_mode():
            model(image)

    Afterwards the weights are the very tensors that they were, bit for bit in every dtype, even if the block raises; meanwhile
    both are in memory.  Layers that are merged already stay so.  HiVG at inference: 112 LoRA linears, 1.2 of 74.9 GFLOP and
    560 launches less.

    Args:
        model: in eval mode, for a dropout in front of the update cannot be merged.

    Yields:
        The model.

    Raises:
        ValueError: a LoRA layer is in training mode.
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    if "peft" in sys.modules:  # otherwise nothing can have made such a layer
        from fastadapt.integrations import peft

        layers += [layer for _, layer in peft.lora_layers(model)]
    if any(layer.training for layer in layers):
        fail("model", "a model in eval mode", "one with a LoRA layer in training mode")
    with ExitStack() as stack:
        for layer in layers:
            if not layer.merged:
                stack.enter_context(_merged(layer))
        yield model


@contextmanager
def _merged(layer: nn.Module) -> Iterator[None]:
    own = isinstance(layer, LoraLinear)
    weight = layer.weight if own else layer.get_base_layer().weight
    original = weight.data
    weight.data = original.clone()
    try:
        with torch.no_grad():
            layer.merge()
        yield
    finally:
        weight.data = original
        if own:
            layer.merged = False
        else:
            layer.merged_adapters.clear()
