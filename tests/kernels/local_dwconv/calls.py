"""Calls of local_dwconv as the tests make them, and the plain compositions of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import local_dwconv
from fastadapt.core.launch import interpreting

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
randn = partial(torch.randn, device=DEVICE)

BACKENDS = ("reference", "triton")
EVERYTHING = ("x", "weight", "bias")


@dataclass(frozen=True)
class Call:
    """Arguments of local_dwconv."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grid: tuple[int, int]
    prefix_tokens: int = 1
    dilation: int = 1

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: getattr(self, name) for name in EVERYTHING if getattr(self, name) is not None}

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with its tensors in this dtype or on this device; leaves that require what they did."""
        return replace(
            self, **{name: t.detach().to(target).requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        )

    def with_tensors(self, *tensors: Tensor) -> Call:
        """The same call on other tensors, in the order of `tensors`."""
        return replace(self, **dict(zip(self.tensors, tensors)))

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self


def make(
    batch: int = 2,
    grid: tuple[int, int] = (5, 9),
    channels: int = 6,
    kernel: tuple[int, int] = (3, 3),
    prefix_tokens: int = 1,
    dilation: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
    needs: Sequence[str] = EVERYTHING,
) -> Call:
    """A call on random tensors; the weight's numbers are of a size that leaves the result's at about one."""
    own = parameter_dtype or dtype
    x = randn(batch, prefix_tokens + grid[0] * grid[1], channels).to(dtype)
    weight = (randn(channels, *kernel) * (kernel[0] * kernel[1]) ** -0.5).to(own)
    added = randn(channels).to(own) if bias else None
    return Call(x, weight, added, grid, prefix_tokens, dilation).requiring(*needs)


LAYOUTS = {
    "tokens first": lambda randn, tokens, width: randn(tokens, 3, width).transpose(0, 1),
    "a slice of the channels": lambda randn, tokens, width: randn(3, tokens, 3 * width)[..., width : 2 * width],
    "every other token": lambda randn, tokens, width: randn(6, 2 * tokens, width)[::2, 1::2],
    "every other channel": lambda randn, tokens, width: randn(3, tokens, 2 * width)[..., ::2],
    "channels first": lambda randn, tokens, width: randn(3, width, tokens).transpose(1, 2),
    "one sample for all": lambda randn, tokens, width: randn(1, tokens, width).expand(3, tokens, width),
}


def laid_out(layout: str, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random (3, tokens, width) in one of LAYOUTS."""
    # not cast afterwards: a cast would lay it out anew
    return LAYOUTS[layout](partial(randn, dtype=dtype), tokens, width)


Function = Callable[[Call], Tensor]


def fused(backend: str | None = None) -> Function:
    """The operation."""

    def function(call: Call) -> Tensor:
        return local_dwconv(
            call.x,
            call.weight,
            call.bias,
            grid=call.grid,
            prefix_tokens=call.prefix_tokens,
            dilation=call.dilation,
            backend=backend,
        )

    return function


def composed(call: Call) -> Tensor:
    """torch's convolution of a contiguous image, to and fro, around which the prefix is led."""
    prefix, tokens = call.x.split([call.prefix_tokens, call.x.shape[1] - call.prefix_tokens], 1)
    image = tokens.transpose(1, 2).unflatten(2, call.grid).contiguous()
    dilation = min(call.dilation, 100)  # of which torch pads an image by so many zeros
    padding = [size // 2 * dilation for size in call.weight.shape[1:]]
    own = {"padding": padding, "dilation": dilation, "groups": call.x.shape[-1]}
    weight, bias = (None if t is None else t.to(call.x.dtype) for t in (call.weight, call.bias))
    convolved = F.conv2d(image, weight[:, None], bias, **own)
    return torch.cat([prefix, convolved.flatten(2).transpose(1, 2)], 1)


def summed(call: Call) -> Tensor:
    """The equation itself: a sum over the taps of the grid, padded with zeros, from where each tap sees it."""
    (height, width), p, d = call.grid, call.prefix_tokens, min(call.dilation, 100)
    kh, kw = call.weight.shape[1:]
    image = call.x[:, p:].unflatten(1, call.grid)
    padded = F.pad(image, (0, 0, kw // 2 * d, kw // 2 * d, kh // 2 * d, kh // 2 * d))
    y = torch.zeros_like(image) if call.bias is None else call.bias.expand_as(image)
    for u in range(kh):
        for v in range(kw):
            y = y + call.weight[:, u, v] * padded[:, u * d : u * d + height, v * d : v * d + width]
    return torch.cat([call.x[:, :p], y.flatten(1, 2)], 1)


def results(function: Function, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """The result, and for `grad` of it the gradient of every tensor that requires one."""
    y = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), few_bits(y) if grad is None else grad)
    return {"y": y.detach()} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)
