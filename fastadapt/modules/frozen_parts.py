"""The parts of a frozen transformer block as the module objects that hold them, and the tensors that a call reads from them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.core.backend import autocast_dtype
from fastadapt.core.philox import threshold
from fastadapt.modules.lora import LoraLinear, PhiloxDropout

DROPOUTS = (nn.Dropout, PhiloxDropout, nn.Identity)
_LINEARS = ("q", "k", "v", "out", "fc1", "fc2")


class Member(NamedTuple):
    """A frozen linear and its LoRA update, with the names that `fastadapt.frozen_group` has for them; no LoRA is two Nones."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout_p: float = 0.0


# how to read a Member from a module of a type other than nn.Linear, for an x, or say why a call of it is something else
READERS: dict[type, Callable[[nn.Module, Tensor], Member | str]] = {}


class Parts(NamedTuple):
    """A transformer block, x (B, T, C) in its own order of operations.

    pre-LN:   s = x + c1 o drop(out(attention(LN1(x)))),      y = s + c2 o drop(fc2(act(fc1(LN2(s)))))
    post-LN:  n = LN1(x + drop(out(attention(x)))),           y = LN2(n + drop(fc2(act(fc1(n)))))

    q, k, v, out, fc1, fc2 are linears, with or without LoRA; activation is a name that `fastadapt.frozen_group` knows; c1, c2
    are `scale1` and `scale2`; `dropout1` and `dropout2` are the two probabilities of drop, and `attention_dropout` that of the
    attention's weights, all 0 outside training.
    """

    norm1: nn.LayerNorm
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    norm2: nn.LayerNorm
    fc1: nn.Module
    fc2: nn.Module
    activation: str
    heads: int
    pre_norm: bool = True
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    dropout1: float = 0.0
    dropout2: float = 0.0
    attention_dropout: float = 0.0


class Tensors(NamedTuple):
    """What a call reads: the Members of q, k, v; of out; of fc1; of fc2."""

    attention: tuple[Member, ...]
    out: Member
    fc1: Member
    fc2: Member

    @property
    def trained(self) -> list[Tensor]:
        """The LoRA factors that require a gradient."""
        members = (*self.attention, self.out, self.fc1, self.fc2)
        return [t for member in members for t in member[2:4] if t is not None and t.requires_grad]

    @property
    def drops(self) -> bool:
        return any(threshold(member.dropout_p) for member in (*self.attention, self.out, self.fc1, self.fc2))


def tensors_of(parts: Parts, x: Tensor) -> Tensors | str:
    """The tensors that a call on x reads, or why it cannot be computed from them alone."""
    if type(x) is not Tensor or x.ndim != 3:
        return f"x is a {type(x).__name__} of {x.ndim} dimensions"
    members = []
    for name in _LINEARS:
        linear = getattr(parts, name)
        found = member_of(linear, x)
        if isinstance(found, str):
            return f"{name}: {found}"
        if reason := why_not_frozen(found.weight, found.bias):
            return f"{name}: {reason}"
        members.append(found)
    for name in ("norm1", "norm2"):
        norm = getattr(parts, name)
        if type(norm) is not nn.LayerNorm:
            return f"{name} is {type(norm).__name__}"
        if norm.normalized_shape != x.shape[-1:]:
            return f"{name} is of shape {tuple(norm.normalized_shape)}"
        if reason := why_not_plain(norm) or why_not_frozen(norm.weight, norm.bias):
            return f"{name}: {reason}"
        if reason := why_not_read(x, norm.weight, norm.bias):
            return f"{name}: {reason}"
    scales = (parts.scale1, parts.scale2)
    if reason := why_not_frozen(*scales) or why_not_read(x, *scales):
        return f"layer scale: {reason}"
    if any(p >= 1 for p in (parts.dropout1, parts.dropout2, *(member.dropout_p for member in members))):
        return "a dropout leaves nothing"
    attention = tuple(members[:3])
    if len({member.dropout_p for member in attention if member.lora_a is not None}) > 1:
        return "the LoRA dropouts of q, k and v differ"
    return Tensors(attention, *members[3:])


def member_of(linear: nn.Module, x: Tensor) -> Member | str:
    """The linear's tensors, or why calling it is more than they say."""
    reader = READERS.get(type(linear))
    if reader is not None:
        return reader(linear, x)
    if reason := why_not_linear(linear):
        return reason
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    return why_not_dtypes(x, weight) or Member(weight, bias)


def why_not_linear(module: nn.Module) -> str | None:
    """Why calling the module is more than a linear with its own weight."""
    if type(module).forward is not nn.Linear.forward:
        return f"is {type(module).__name__}"
    if "weight" not in module._parameters:
        return "computes its weight"
    return why_not_plain(module)


def why_not_plain(module: nn.Module) -> str | None:
    """Why calling the module is more than its class's forward.  A call asks thirty times: attributes would cost it twice as much."""
    own = module.__dict__
    if (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own  # how accelerate and diffusers hook a module
    ):
        return "has hooks"
    return None


def why_not_frozen(*tensors: Tensor | None) -> str | None:
    """Why the tensors are not frozen ones; where no gradient is recorded, all are."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            return "trains"
        if type(tensor) not in (nn.Parameter, Tensor):
            return "is quantised or sharded"
    return None


def why_not_read(x: Tensor, *tensors: Tensor | None) -> str | None:
    """Why what is around the linears cannot read the tensors beside x."""
    dtypes = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in dtypes and autocast_dtype(x) is None:
            return f"x is {x.dtype}, it is {tensor.dtype}"
        if tensor.device != x.device:
            return f"x is on {x.device}, it is on {tensor.device}"
    return None


def why_not_dtypes(x: Tensor, weight: Tensor) -> str | None:
    if weight.dtype is not x.dtype and autocast_dtype(x) is None:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    return None


def _own_member(linear: LoraLinear, x: Tensor) -> Member | str:
    if reason := why_not_plain(linear) or why_not_dtypes(x, linear.weight):
        return reason
    if linear.merged:
        return Member(linear.weight, linear.bias)
    dropout_p = linear.lora_dropout if linear.training else 0.0
    return Member(linear.weight, linear.bias, linear.lora_A, linear.lora_B, linear.scaling, dropout_p)


READERS[LoraLinear] = _own_member


def load_readers() -> None:
    """Make PEFT's linears readable, where there can be any."""
    if "peft" in sys.modules:
        import fastadapt.integrations.peft  # noqa: F401
