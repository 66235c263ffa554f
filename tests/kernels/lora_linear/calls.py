"""Calls of lora_linear as the tests make them, and the plain composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import lora_linear, lora_linear_group
from fastadapt.core import philox
from fastadapt.core.launch import interpreting

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
randn = partial(torch.randn, device=DEVICE)


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

    def with_tensors(self, *tensors: Tensor) -> Call:
        """The same call on other tensors, given in the order of `self.tensors`."""
        x, *flat = tensors
        left = iter(flat)
        members = tuple(Member(*(None if t is None else next(left) for t in member)) for member in self.members)
        return replace(self, x=x, members=members)

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient; a name without [g] means every member's."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names or name.split("[")[0] in names)
        return self


TRAINED = ("x", "lora_a", "lora_b")
EVERYTHING = ("x", "weight", "bias", "lora_a", "lora_b")
FLOAT64_BACKENDS = ("reference", "native") if DEVICE.type == "cpu" else ("reference",)
BACKENDS = (*FLOAT64_BACKENDS, "triton")


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
    """A call with random tensors of unit-sized products.

    x: a tensor, or the shape of one; biases: which members have one; needs: as for `Call.requiring`.
    """
    x = x.detach() if isinstance(x, Tensor) else randn(*x).to(dtype)
    depth = x.shape[-1]

    def member(width: int, rank: int, bias: bool) -> Member:
        return Member(
            (randn(width, depth) / max(depth, 1) ** 0.5).to(dtype),
            randn(width).to(dtype) if bias else None,
            (randn(rank, depth) / max(depth, 1) ** 0.5).to(adapter_dtype or dtype),
            (randn(width, rank) / rank**0.5).to(adapter_dtype or dtype),
        )

    members = tuple(map(member, widths, ranks, biases or [True] * len(widths)))
    scales = tuple(0.5 + 0.75 * g for g in range(len(members)))
    return Call(x, members, scales, dropout_p).requiring(*needs)


LAYOUTS = {
    "vector": lambda randn: randn(20),
    "3-D": lambda randn: randn(3, 4, 20),
    "4-D": lambda randn: randn(2, 3, 1, 20),
    "transposed": lambda randn: randn(20, 12).t(),
    "tokens first": lambda randn: randn(4, 3, 20).transpose(0, 1),
    "sliced": lambda randn: randn(6, 5, 50)[::2, 1:, 3:43:2],
    "expanded rows": lambda randn: randn(1, 20).expand(6, 20),
    "expanded columns": lambda randn: randn(6, 1).expand(6, 20),
    "no rows": lambda randn: randn(0, 20),
    "no rows in 3-D": lambda randn: randn(3, 0, 20),
}


def laid_out(layout: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random tensor with 20 columns in one of LAYOUTS."""
    # not cast afterwards: a cast would lay it out anew
    return LAYOUTS[layout](partial(randn, dtype=dtype))


Function = Callable[[Call], Sequence[Tensor]]


def fused(backend: str | None = None) -> Function:
    """The operation."""

    def function(call: Call) -> Sequence[Tensor]:
        options = {"dropout_p": call.dropout_p, "backend": backend}
        if len(call.members) == 1:
            return (lora_linear(call.x, *call.members[0], scale=call.scales[0], **options),)
        return lora_linear_group(call.x, *zip(*call.members), scales=call.scales, **options)

    return function


def composed(call: Call) -> Sequence[Tensor]:
    """PEFT's expression for each member, F.linear(x, W, b) + scale F.linear(F.linear(mask x / (1 - p), A), B).

    The masks are those that `fused` draws.  Weights of another dtype than x are cast to x's first, as autocast would.
    """
    x, dtype = call.x, call.x.dtype
    seed = philox.draw_seed(x.device)
    outputs = []
    for g, member in enumerate(call.members):
        weight, bias, lora_a, lora_b = (None if tensor is None else tensor.to(dtype) for tensor in member)
        mask = philox.keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], call.dropout_p, g).view(x.shape)
        dropped = mask * x * philox.inv_keep(call.dropout_p) if call.dropout_p else x
        outputs.append(F.linear(x, weight, bias) + call.scales[g] * F.linear(F.linear(dropped, lora_a), lora_b))
    return outputs


def results(
    function: Function, call: Call, grads: Sequence[Tensor] | None = None, seed: int = SEED
) -> dict[str, Tensor]:
    """Outputs of the seeded function, and for `grads` of them the gradient of every tensor that requires one."""
    torch.manual_seed(seed)
    outputs = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads or [few_bits(output) for output in outputs])
    found = {f"y[{g}]": output.detach() for g, output in enumerate(outputs)}
    return found | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)
