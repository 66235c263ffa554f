"""Calls of light_interaction as the tests make them, and the composition of torch's own attention that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import light_interaction
from fastadapt.core.launch import interpreting

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
BACKENDS = ("reference", "triton")
randn = partial(torch.randn, device=DEVICE)
ROLES = ("in_weight", "in_bias", "out_weight", "out_bias")
WEIGHTS = tuple(f"{role}[{direction}]" for role in ROLES for direction in (0, 1))
EVERYTHING = ("x", "y", *WEIGHTS)


@dataclass(frozen=True)
class Call:
    """Arguments of light_interaction: its tensors under the names in EVERYTHING, in that order, and the rest."""

    tensors: dict[str, Tensor]
    num_heads: int
    mask: Tensor | None = None

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with every tensor in this dtype or on this device, a leaf that requires what it did."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(target).requires_grad_(tensor.requires_grad)

        mask = self.mask if self.mask is None or isinstance(target, torch.dtype) else self.mask.to(target)
        return replace(self, tensors={name: moved(tensor) for name, tensor in self.tensors.items()}, mask=mask)

    def having(self, **changed: Tensor) -> Call:
        """The same call with another x or y."""
        return replace(self, tensors=self.tensors | changed)

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self

    @property
    def arguments(self) -> tuple:
        """x, y and the four pairs of weights and biases."""
        x, y, *flat = self.tensors.values()
        return x, y, *(flat[i : i + 2] for i in range(0, len(flat), 2))


def make(
    x: Tensor | Sequence[int],
    y: Tensor | int,
    num_heads: int,
    mask: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
    needs: Sequence[str] = EVERYTHING,
) -> Call:
    """A call with random tensors of unit-sized products.

    x: a tensor or its shape; y: a tensor or its number of words; mask: how many words each sample has that are not masked.
    """
    x = x.detach() if isinstance(x, Tensor) else randn(*x, dtype=dtype)
    batch, _, width = x.shape
    y = y.detach() if isinstance(y, Tensor) else randn(batch, y, width, dtype=dtype)
    tensors = {"x": x, "y": y}
    shapes = {"in_weight": (3 * width, width), "in_bias": (3 * width,), "out_weight": (width, width), "out_bias": (width,)}
    for name in WEIGHTS:
        shape = shapes[name[:-3]]
        scale = width**-0.5 if len(shape) == 2 else 1.0
        tensors[name] = (scale * randn(*shape)).to(weight_dtype or dtype)
    if mask is not None:
        mask = torch.arange(y.shape[1], device=DEVICE) >= torch.tensor(mask, device=DEVICE)[:, None]
    return Call(tensors, num_heads, mask).requiring(*needs)


Function = Callable[[Call], Sequence[Tensor]]


def fused(backend: str | None = None) -> Function:
    """The operation."""

    def function(call: Call) -> Sequence[Tensor]:
        return light_interaction(*call.arguments, num_heads=call.num_heads, y_padding_mask=call.mask, backend=backend)

    return function


def composed(call: Call, need_weights: bool = False) -> Sequence[Tensor]:
    """torch's own multi-head attention in both directions, and the products.

    Weights of another dtype than x are cast to x's first, as autocast would.
    """
    x, y, *roles = call.arguments
    outputs = []
    for i, (source, target, mask) in enumerate(((x, y, call.mask), (y, x, None))):
        in_weight, in_bias, out_weight, out_bias = (role[i].to(x.dtype) for role in roles)
        query, both = source.transpose(0, 1), target.transpose(0, 1)
        attention, _ = F.multi_head_attention_forward(
            query, both, both, x.shape[-1], call.num_heads, in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias,
            key_padding_mask=mask, need_weights=need_weights,
        )  # fmt: skip
        outputs.append(source * attention.transpose(0, 1))
    return outputs


def results(function: Function, call: Call, grads: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Both outputs, and for `grads` of them the gradient of every tensor that requires one."""
    outputs = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    grads = grads or [few_bits(output) for output in outputs]
    # torch's expression of a direction without a tensor that requires a gradient has none
    read, given = zip(*((output, grad) for output, grad in zip(outputs, grads) if output.requires_grad))
    gradients = torch.autograd.grad(read, list(wanted.values()), given)
    found = dict(zip(("x'", "y'"), (output.detach() for output in outputs)))
    return found | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)
