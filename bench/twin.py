"""PEFT's and transformers' own layers with the dropout masks of a fused model, to compare the two number by number."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

import fastadapt
from fastadapt.core import philox
from fastadapt.integrations.transformers import at, family_of, is_known
from fastadapt.modules.frozen_run import SITES


class SeededDropout(nn.Module):
    """Dropout with masks by the seeds of the layer around it: a site of SITES and a member for each call in turn."""

    def __init__(self, p: float, *places: tuple[str, int]) -> None:
        super().__init__()
        self.p, self.places, self.calls = p, places, 0
        self.seeds: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or philox.threshold(self.p) == 0:
            return x
        site, member = self.places[self.calls % len(self.places)]
        self.calls += 1
        rows = x.reshape(-1, x.shape[-1])
        keep = philox.keep_mask(self.seeds[site], *rows.shape, self.p, member)
        return (torch.where(keep, rows, 0) * philox.inv_keep(self.p)).view(x.shape)


def with_fused_masks(model: nn.Module) -> nn.Module:
    """The model, unfused, dropping what `fastadapt.fuse(model)` would: LoRA's inputs and the branches of known layers."""
    for layer in [module for module in model.modules() if is_known(module)]:
        _seed(layer)
    for module in model.modules():
        if isinstance(module, Linear):
            for adapter, dropout in module.lora_dropout.items():
                if not isinstance(dropout, SeededDropout):
                    module.lora_dropout[adapter] = fastadapt.PhiloxDropout(getattr(dropout, "p", 0.0))
    return model


def _seed(layer: nn.Module) -> None:
    family = family_of(layer)
    groups = {"qkv": ("q", "k") if family.position else ("q", "k", "v"), "out": ("out",), "fc1": ("fc1",), "fc2": ("fc2",)}
    groups |= {"v": ("v",)} if family.position else {}
    found: list[SeededDropout] = []
    for site, roles in groups.items():
        linears = [linear for role in roles if isinstance(linear := at(layer, getattr(family, role)), Linear)]
        for member, linear in enumerate(linears):
            for adapter, dropout in linear.lora_dropout.items():
                linear.lora_dropout[adapter] = SeededDropout(getattr(dropout, "p", 0.0), (site, member))
                found.append(linear.lora_dropout[adapter])
    branches: dict[str, list[tuple[str, int]]] = {}
    for site, place in (("branch1", family.dropout1), ("branch2", family.dropout2)):
        if place is not None and place[1] == "p":
            branches.setdefault(place[0], []).append((site, 0))
    for path, places in branches.items():
        parent, _, name = path.rpartition(".")
        dropout = SeededDropout(at(layer, path).p, *places)
        setattr(at(layer, parent), name, dropout.train(layer.training))
        found.append(dropout)

    def draw(module: nn.Module, args: Any, kwargs: Any) -> None:
        """What the fused layer draws, when it would."""
        if any(dropout.training and philox.threshold(dropout.p) for dropout in found):
            x = args[0] if args else kwargs["hidden_states"]
            seeds = dict(zip(SITES, philox.draw_seeds(x.device, len(SITES))))
            for dropout in found:
                dropout.seeds, dropout.calls = seeds, 0

    layer.register_forward_pre_hook(draw, with_kwargs=True)
