"""Calls of bottleneck_adapter as the tests make them, and the plain composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import bottleneck_adapter
from fastadapt.core.launch import interpreting
from tests.tolerance import SLACK, no_worse_than

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
BACKENDS = ("reference", "triton")
ACTIVATIONS = ("relu", "gelu", "quick_gelu", "identity")
randn = partial(torch.randn, device=DEVICE)


@dataclass(frozen=True)
class Call:
    """Tensors of a call by bottleneck_adapter's names, and its other arguments; a scale tensor is among the tensors."""

    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with every tensor in this dtype or on this device, a leaf that requires what it did."""
        return self.with_tensors(t.detach().to(target).requires_grad_(t.requires_grad) for t in self.tensors.values())

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """The same call on other tensors, given in the order of `self.tensors`."""
        return replace(self, tensors=dict(zip(self.tensors, tensors)))

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self


def make(
    x: Tensor | Sequence[int],
    h: int = 5,
    width: int = 12,
    *,
    norm: bool = False,
    norm_bias: bool = True,
    biases: bool = True,
    scale: float | str = 1.0,
    residual: bool = False,
    activation: str = "relu",
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> Call:
    """A call with random tensors of unit-sized products; scale: a number, or "shared" or "rows" for a tensor.

    x: a tensor, or the shape of one, which requires no gradient if `frozen`; everything else does.
    """
    x = x.detach() if isinstance(x, Tensor) else randn(*x).to(dtype)
    depth, own = x.shape[-1], parameter_dtype or x.dtype
    tensors = {
        "x": x,
        "down_weight": (randn(h, depth) / max(depth, 1) ** 0.5).to(own),
        "down_bias": randn(h).to(own) if biases else None,
        "up_weight": (randn(width, h) / h**0.5).to(own),
        "up_bias": randn(width).to(own) if biases else None,
        "norm_weight": (1 + 0.5 * randn(depth)).to(own) if norm else None,
        "norm_bias": randn(depth).to(own) if norm and norm_bias else None,
        "scale": randn(() if scale == "shared" else x.shape[:-1]).to(own) if isinstance(scale, str) else None,
        "residual": randn(*x.shape[:-1], width).to(x.dtype) if residual else None,
    }
    options = {"activation": activation} | ({} if isinstance(scale, str) else {"scale": scale})
    call = Call({name: tensor for name, tensor in tensors.items() if tensor is not None}, options)
    return call.requiring(*(name for name in call.tensors if not (frozen and name == "x")))


Function = Callable[[Call], Tensor]


def fused(backend: str | None = None) -> Function:
    """The operation."""

    def function(call: Call) -> Tensor:
        arguments = {"down_bias": None, "up_bias": None} | call.tensors | call.options
        return bottleneck_adapter(**arguments, backend=backend)

    return function


def composed(call: Call) -> Tensor:
    """The equation in torch's own functions, in x's dtype; parameters of another are cast to it first, as autocast would."""
    x = call.tensors["x"]
    get = {name: t if name == "residual" else t.to(x.dtype) for name, t in call.tensors.items()}.get
    n = x
    if get("norm_weight") is not None:
        n = F.layer_norm(x, x.shape[-1:], get("norm_weight"), get("norm_bias"), call.options.get("norm_eps", 1e-5))
    z = F.linear(n, get("down_weight"), get("down_bias"))
    activations = {
        "relu": F.relu,
        "gelu": F.gelu,
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
        "identity": lambda z: z,
    }
    y = F.linear(activations[call.options["activation"]](z), get("up_weight"), get("up_bias"))
    scale = call.options.get("scale", get("scale"))
    y = y * (scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.ndim else scale)
    return y if get("residual") is None else y + get("residual")


def results(function: Function, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """y, and for `grad` of it the gradient of every tensor that requires one."""
    y = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), few_bits(y) if grad is None else grad)
    return {"y": y.detach()} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def as_near_as_eager(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], slack: Mapping[float, float] = SLACK
) -> None:
    """`no_worse_than`; the gradient of a single number, whose error falls as luck has it, gets four times eager's."""
    single = [name for name, tensor in exact.items() if tensor.ndim == 0]
    several = [name for name in exact if name not in single]
    for names, allowed in ((several, slack), (single, {2: 4.0})):
        no_worse_than(*({name: found[name] for name in names} for found in (ours, eager, exact)), allowed)


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)
