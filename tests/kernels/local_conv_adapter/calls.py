"""Calls of local_conv_adapter as the tests make them, and the composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import local_conv_adapter
from fastadapt.core.launch import interpreting

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
BACKENDS = ("reference", "triton")
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "identity": lambda z: z,
}
NO_BIASES = {"down_bias": None, "conv_bias": None, "up_bias": None}
randn = partial(torch.randn, device=DEVICE)


@dataclass(frozen=True)
class Call:
    """Tensors of a call by local_conv_adapter's names, and its other arguments; a scale tensor is among the tensors."""

    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with every tensor in this dtype or on this device, a leaf that requires what it did."""
        return self.with_tensors([t.detach().to(target).requires_grad_(t.requires_grad) for t in self.tensors.values()])

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """The same call on other tensors, given in the order of `self.tensors`."""
        return replace(self, tensors=dict(zip(self.tensors, tensors)))

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self


def make(
    batch: int = 2,
    grid: tuple[int, int] = (3, 4),
    depth: int = 12,
    h: int = 5,
    width: int = 10,
    *,
    kernel: tuple[int, int] = (3, 3),
    prefix_tokens: int = 1,
    dilation: int = 1,
    biases: bool = True,
    scale: float | str = 1.0,
    residual: bool = False,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
) -> Call:
    """A call on random tensors, of unit-sized products, that all require gradients; scale: a number, "shared" or "rows"."""
    own, tokens = parameter_dtype or dtype, (batch, prefix_tokens + grid[0] * grid[1])
    tensors = {
        "x": randn(*tokens, depth).to(dtype),
        "down_weight": (randn(h, depth) * depth**-0.5).to(own),
        "down_bias": randn(h).to(own) if biases else None,
        "weight": (randn(h, *kernel) * (kernel[0] * kernel[1]) ** -0.5).to(own),
        "conv_bias": randn(h).to(own) if biases else None,
        "up_weight": (randn(width, h) * h**-0.5).to(own),
        "up_bias": randn(width).to(own) if biases else None,
        "scale": randn(() if scale == "shared" else tokens).to(own) if isinstance(scale, str) else None,
        "residual": randn(*tokens, width).to(dtype) if residual else None,
    }
    options = {"grid": grid, "prefix_tokens": prefix_tokens, "dilation": dilation, "activation": activation}
    options |= {} if isinstance(scale, str) else {"scale": scale}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Call(tensors, options).requiring(*tensors)


Function = Callable[[Call], Tensor]


def fused(backend: str | None = None) -> Function:
    """The operation."""
    return lambda call: local_conv_adapter(**NO_BIASES | call.tensors | call.options, backend=backend)


def composed(call: Call) -> Tensor:
    """The equation in torch's own functions, in x's dtype, on a contiguous image; the residual in its own."""
    x, options = call.tensors["x"], call.options
    get = {name: t if name == "residual" else t.to(x.dtype) for name, t in call.tensors.items()}.get
    u = F.linear(x, get("down_weight"), get("down_bias"))
    prefix, patches = u.tensor_split([options["prefix_tokens"]], 1)
    image, weight = patches.transpose(1, 2).unflatten(2, options["grid"]).contiguous(), get("weight")
    dilation = min(options["dilation"], 100)  # of which torch pads an image by so many zeros
    own = {"padding": [size // 2 * dilation for size in weight.shape[1:]], "dilation": dilation, "groups": len(weight)}
    convolved = F.conv2d(image, weight[:, None], get("conv_bias"), **own)
    z = torch.cat([prefix, convolved.flatten(2).transpose(1, 2)], 1)
    y = F.linear(ACTIVATIONS[options["activation"]](z), get("up_weight"), get("up_bias"))
    scale = options.get("scale", get("scale"))
    y = y * (scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.ndim else scale)
    return y if get("residual") is None else y + get("residual")


def results(function: Function, call: Call) -> dict[str, Tensor]:
    """y, and for one gradient of it the gradient of every tensor that requires one."""
    y = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), few_bits(y))
    return {"y": y.detach()} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)
