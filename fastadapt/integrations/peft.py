"""PEFT's LoRA linear, computed by `fastadapt.lora_linear` whenever that means the same.

A fused layer is PEFT's own object with another class: parameters, adapters and bookkeeping stay where PEFT put them,
and each call decides afresh, from the state that PEFT keeps, whether the fused operation can serve it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from fastadapt import lora_linear
from fastadapt.core.backend import autocast_dtype
from fastadapt.core.casts import forget
from fastadapt.core.checks import FLOATS
from fastadapt.modules.frozen_parts import DROPOUTS, READERS, Member, why_not_dtypes, why_not_linear, why_not_plain

_PLAIN_TENSORS = (Tensor, nn.Parameter)  # others are quantised or sharded
_AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedLinear(Linear):
    """peft.tuners.lora.Linear whose forward is the fused operation; calls which that cannot serve run as before."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = operands(self, x, *args, **kwargs)
        if isinstance(found, str):
            return super().forward(x, *args, **kwargs)
        weight, bias, lora_a, lora_b, scale, dropout_p = found
        return lora_linear(x, weight, bias, lora_a, lora_b, scale=scale, dropout_p=dropout_p)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)
        forget(self.base_layer.parameters())  # PEFT writes through .data, which no version counter sees

    def unmerge(self) -> None:
        super().unmerge()
        forget(self.base_layer.parameters())


class Operands(NamedTuple):
    """What `fastadapt.lora_linear` takes beside x, with its names and shapes."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout_p: float


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every PEFT LoRA layer of the model, of whatever kind, with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def fuse_layer(layer: LoraLayer) -> str | None:
    """Make a plain LoRA linear a FusedLinear; returns why not where the layer is left alone."""
    reason = why_never(layer)
    if reason is None:
        layer.__class__ = FusedLinear
    return reason


def unfuse_layer(layer: LoraLayer) -> None:
    """Undo `fuse_layer`."""
    if type(layer) is FusedLinear:
        layer.__class__ = Linear


def why_never(layer: LoraLayer) -> str | None:
    """Why no call of the layer can be fused, with the adapters that it has now; None for a layer worth fusing."""
    if type(layer) not in (Linear, FusedLinear):
        return f"lora.{type(layer).__name__} is not lora.Linear"
    reasons = [_why_not_adapter(layer, adapter) for adapter in layer.lora_A]
    return _why_not_linear("base_layer", layer.base_layer) or (reasons[0] if reasons and all(reasons) else None)


def why_not(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why layer(x, *args, **kwargs) has to be PEFT's own forward; None if the fused operation means the same."""
    found = operands(layer, x, *args, **kwargs)
    return found if isinstance(found, str) else None


def operands(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Operands | str:
    """The operands with which `lora_linear` computes layer(x, *args, **kwargs), or the reason why it cannot.

    This is part of every call, so modules and parameters are read from the dicts that hold them: as an attribute of an
    nn.Module each would cost 0.5 to 0.8 us.
    """
    if args or kwargs:
        return f"called with {', '.join(kwargs) or 'further arguments'}"
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "the adapter is merged into the weight"
    children = layer._modules
    base, lora_as, lora_bs = children["base_layer"], children["lora_A"]._modules, children["lora_B"]._modules
    adapter = layer.active_adapter
    if not isinstance(adapter, str):
        active = [name for name in adapter if name in lora_as]
        if len(active) != 1:
            return f"{len(active)} adapters are active"
        (adapter,) = active
    elif adapter not in lora_as:
        return "0 adapters are active"
    if reason := _why_not_linear("base_layer", base) or _why_not_adapter(layer, adapter):
        return reason
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    lora_a, lora_b = lora_as[adapter]._parameters["weight"], lora_bs[adapter]._parameters["weight"]
    if reason := _why_not_tensors(x, weight, lora_a, lora_b):
        return reason
    dropout = children["lora_dropout"]._modules[adapter]
    dropout_p = dropout.p if dropout.training and type(dropout) is not nn.Identity else 0.0
    return Operands(weight, bias, lora_a, lora_b, layer.scaling[adapter], dropout_p)


def member(layer: Linear, x: Tensor) -> Member | str:
    """The layer as a part of a frozen block (fastadapt.modules.frozen_parts), or why it cannot be one."""
    if reason := why_not_plain(layer):
        return reason
    if layer.merged == layer.disable_adapters:
        found = operands(layer, x)
        return found if isinstance(found, str) else Member(*found)
    base = layer._modules["base_layer"]  # alone it is what the layer computes, merged or with adapters disabled
    if reason := _why_not_linear("base_layer", base) or why_not_dtypes(x, base._parameters["weight"]):
        return reason
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if layer.merged and (dtype := autocast_dtype(x)) is not None:  # a kept cast may be older than the merging
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return Member(weight, bias)


READERS[Linear] = READERS[FusedLinear] = member


def _why_not_linear(name: str, module: nn.Module) -> str | None:
    """Why calling the module is more than a linear with its own weight."""
    reason = why_not_linear(module)
    return reason and f"{name} {reason}"


def _why_not_adapter(layer: Linear, adapter: str) -> str | None:
    if adapter in layer.lora_variant:
        return f"{type(layer.lora_variant[adapter]).__name__} is not plain LoRA"
    if layer.lora_bias[adapter]:
        return "lora_bias is set"
    children = layer._modules
    dropout = children["lora_dropout"]._modules[adapter]
    if type(dropout) not in DROPOUTS:
        return f"lora_dropout is {type(dropout).__name__}"
    return _why_not_linear("lora_A", children["lora_A"]._modules[adapter]) or _why_not_linear(
        "lora_B", children["lora_B"]._modules[adapter]
    )


def _why_not_tensors(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> str | None:
    if (
        type(x) is Tensor
        and type(weight) is type(lora_a) is type(lora_b) is nn.Parameter
        and x.dtype is weight.dtype is lora_a.dtype is lora_b.dtype
        and x.dtype in FLOATS
    ):
        return None  # the common case, without the questions below
    for name, tensor in (("x", x), ("the weight", weight), ("lora_A", lora_a), ("lora_B", lora_b)):
        if type(tensor) not in _PLAIN_TENSORS:
            return f"{name} is a {type(tensor).__name__}"
    dtype, adapter_dtype = x.dtype, lora_a.dtype
    if dtype not in FLOATS:
        return f"x is {dtype}"
    if lora_b.dtype != adapter_dtype:
        return f"lora_A is {adapter_dtype}, lora_B {lora_b.dtype}"
    if torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type):  # for meta the CPU's, as in core.backend.autocast_dtype
        others = [d for d in (dtype, weight.dtype, adapter_dtype) if d not in _AUTOCAST_DTYPES]
        return f"{others[0]} under autocast" if others else None
    if weight.dtype != dtype:
        return f"x is {dtype}, the weight {weight.dtype}"
    if adapter_dtype != dtype and (adapter_dtype != torch.float32 or dtype == torch.float64):
        return f"x is {dtype}, lora_A {adapter_dtype}"
    return None
