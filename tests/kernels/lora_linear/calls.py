"""Calls of lora_linear as the tests make them, and the plain composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import lora_linear, lora_linear_group
from fastadapt.core import philox

SEED = 11


class Member(NamedTuple):
    """One linear with its factors; a bias may be None."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor


@dataclass(frozen=True)
class Call:
    """Arguments of lora_linear (one member) or lora_linear_group."""

    x: Tensor
    members: tuple[Member, ...]
    scales: tuple[float, ...]
    dropout_p: float = 0.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: x, weight[0], bias[0], lora_a[0], lora_b[0], weight[1], ..."""
        named = {"x": self.x}
        for g, member in enumerate(self.members):
            named |= {f"{field}[{g}]": tensor for field, tensor in member._asdict().items() if tensor is not None}
        return named

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with every tensor in this dtype or on this device, a leaf that requires what it did."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(target).requires_grad_(tensor.requires_grad)

        members = tuple(Member(*map(moved, member)) for member in self.members)
        return replace(self, x=moved(self.x), members=members)

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient; a name without [g] means every member's."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names or name.split("[")[0] in names)
        return self


TRAINED = ("x", "lora_a", "lora_b")
EVERYTHING = ("x", "weight", "bias", "lora_a", "lora_b")
BACKENDS = ("reference", "triton")


def make(
    x: Tensor | Sequence[int],
    widths: Sequence[int] = (40,),
    ranks: Sequence[int] = (3,),
    biases: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
    needs: Sequence[str] = TRAINED,
) -> Call:
    """A call with random tensors of unit-sized products; x is a tensor or its shape; biases says which members have one."""
    x = x.detach() if isinstance(x, Tensor) else torch.randn(*x).to(dtype)
    depth = x.shape[-1]

    def member(width: int, rank: int, bias: bool) -> Member:
        return Member(
            (torch.randn(width, depth) / max(depth, 1) ** 0.5).to(dtype),
            torch.randn(width).to(dtype) if bias else None,
            (torch.randn(rank, depth) / max(depth, 1) ** 0.5).to(adapter_dtype or dtype),
            (torch.randn(width, rank) / rank**0.5).to(adapter_dtype or dtype),
        )

    members = tuple(map(member, widths, ranks, biases or [True] * len(widths)))
    scales = tuple(0.5 + 0.75 * g for g in range(len(members)))
    return Call(x, members, scales, dropout_p).requiring(*needs)


Function = Callable[[Call], Sequence[Tensor]]


def fused(backend: str | None = None, seed: int = SEED) -> Function:
    """The operation, its masks drawn after torch.manual_seed(seed)."""

    def function(call: Call) -> Sequence[Tensor]:
        torch.manual_seed(seed)
        if len(call.members) == 1:
            options = {"dropout_p": call.dropout_p, "backend": backend}
            return (lora_linear(call.x, *call.members[0], scale=call.scales[0], **options),)
        fields = zip(*call.members)
        return lora_linear_group(call.x, *fields, scales=call.scales, dropout_p=call.dropout_p, backend=backend)

    return function


def composed(call: Call) -> Sequence[Tensor]:
    """F.linear(x, W, b) + scale F.linear(F.linear(mask x / (1 - p), A), B) for each member, with the masks of `fused`.

    This is PEFT's expression.  Weights of another dtype than x are cast to x's first, as autocast would.
    """
    x, dtype = call.x, call.x.dtype
    torch.manual_seed(SEED)
    seed = philox.draw_seed(x.device)
    outputs = []
    for g, member in enumerate(call.members):
        weight, bias, lora_a, lora_b = (None if tensor is None else tensor.to(dtype) for tensor in member)
        mask = philox.keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], call.dropout_p, g).view(x.shape)
        dropped = mask * x * philox.inv_keep(call.dropout_p) if call.dropout_p else x
        outputs.append(F.linear(x, weight, bias) + call.scales[g] * F.linear(F.linear(dropped, lora_a), lora_b))
    return outputs


def results(function: Function, call: Call, grads: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """The outputs, and the gradient of every tensor that requires one for `grads` of the outputs (default: random ones)."""
    outputs = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    grads = grads or output_grads(call, outputs)
    # what nothing depends on would be a fault: allow_unused stays off
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads)
    found = {f"y[{g}]": output.detach() for g, output in enumerate(outputs)}
    return found | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def output_grads(call: Call, outputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient for each output: the same numbers for equal shapes, whatever the dtype."""
    generator = torch.Generator(call.x.device).manual_seed(SEED)

    def gradient(output: Tensor) -> Tensor:
        # bfloat16 values of few bits, which every dtype holds exactly
        numbers = torch.randint(-8, 9, output.shape, generator=generator, device=output.device) / 8
        return numbers.to(output.dtype)

    return [gradient(output) for output in outputs]
