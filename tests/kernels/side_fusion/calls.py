"""Calls of side_fusion as the tests make them, and the plain composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import SideTap, side_fusion
from fastadapt.core.launch import interpreting

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
BACKENDS = ("reference", "native", "triton") if DEVICE.type == "cpu" else ("reference", "triton")
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "identity": lambda z: z,
}
randn = partial(torch.randn, device=DEVICE)


@dataclass(frozen=True)
class Spec:
    """An adapter: widths of tap and hidden, columns of its own and the shared up-projection, and what else it has.

    Without columns of either it has no up-projection.  share: which of the call's shared projections; None for one of its own.
    """

    depth: int = 6
    hidden: int = 5
    own: int = 8
    shared: int = 0
    share: str | None = None
    biases: bool = True
    norm: bool = False
    norm_bias: bool = True
    out_norm: bool = False
    out_bias: bool = True
    activation: str = "relu"
    scale: float = 1.0
    out_norm_eps: float = 1e-5

    @property
    def width(self) -> int:
        return self.own + self.shared or self.hidden


@dataclass(frozen=True)
class Call:
    """Every tensor of a call once, by a name of its own; the bases' names; each adapter's names by SideTap's, and numbers."""

    tensors: dict[str, Tensor]
    bases: tuple[str, ...]
    adapters: tuple[dict[str, str], ...]
    numbers: tuple[dict[str, object], ...]

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with every tensor in this dtype or on this device, a leaf that requires what it did."""
        return self.with_tensors([t.detach().to(target).requires_grad_(t.requires_grad) for t in self.tensors.values()])

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """The same call on other tensors, given in the order of `self.tensors`."""
        return replace(self, tensors=dict(zip(self.tensors, tensors, strict=True)))

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for name, tensor in self.tensors.items() if name not in self.bases and not name.endswith("tap")]

    def adapter(self, i: int) -> dict:
        return {field: self.tensors[name] for field, name in self.adapters[i].items()} | self.numbers[i]


def make(
    leading: Tensor | Sequence[int],
    specs: Sequence[Spec] | Spec,
    bases: int | Sequence[torch.dtype] = 0,
    *,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
) -> Call:
    """A call with random tensors of unit-sized products, of which the parameters and bases require a gradient.

    leading: the taps' leading shape, or a tensor that is the tap of every adapter; bases: how many, or their dtypes.
    """
    specs = [specs] if isinstance(specs, Spec) else specs
    tap = leading if isinstance(leading, Tensor) else None
    leading, dtype = (leading, dtype) if tap is None else (tap.shape[:-1], tap.dtype)
    own = parameter_dtype or dtype
    bases = [dtype] * bases if isinstance(bases, int) else bases
    tensors = {f"base {i}": randn(*leading, specs[0].width).to(each) for i, each in enumerate(bases)}
    adapters, numbers = [], []
    for i, spec in enumerate(specs):
        found = {"tap": randn(*leading, spec.depth).to(dtype) if tap is None else tap.detach()}
        found["down_weight"] = (randn(spec.hidden, spec.depth) / spec.depth**0.5).to(own)
        sizes = {"down_bias": spec.hidden, "up_bias": spec.own, "shared_bias": spec.shared}
        found |= {name: randn(size).to(own) for name, size in sizes.items() if spec.biases and size}
        for name, size in (("up_weight", spec.own), ("shared_weight", spec.shared)):
            if size:
                found[name] = (randn(size, spec.hidden) / spec.hidden**0.5).to(own)
        for name, size, there, bias in (
            ("norm", spec.depth, spec.norm, spec.norm_bias),
            ("out_norm", spec.width, spec.out_norm, spec.out_bias),
        ):
            if there:
                found[f"{name}_weight"] = (1 + 0.5 * randn(size)).to(own)
            if there and bias:
                found[f"{name}_bias"] = randn(size).to(own)
        places = {name: f"{spec.share if spec.share and name.startswith('shared') else i} {name}" for name in found}
        tensors = {places[name]: tensor for name, tensor in found.items()} | tensors
        adapters.append(places)
        numbers.append({"activation": spec.activation, "scale": spec.scale, "out_norm_eps": spec.out_norm_eps})
    call = Call(tensors, tuple(f"base {i}" for i in range(len(bases))), tuple(adapters), tuple(numbers))
    return call.requiring(*(name for name in tensors if not name.endswith(("tap", "out_norm_weight", "out_norm_bias"))))


Function = Callable[[Call], Tensor]


def fused(backend: str | None = None) -> Function:
    """The operation."""

    def function(call: Call) -> Tensor:
        taps = [SideTap(**call.adapter(i)) for i in range(len(call.adapters))]
        return side_fusion(taps, [call.tensors[name] for name in call.bases], backend=backend)

    return function


def one(
    tap: Tensor, down_weight: Tensor, down_bias: Tensor | None = None, *, activation: str, scale: float, out_norm_eps: float,
    up_weight: Tensor | None = None, up_bias: Tensor | None = None, shared_weight: Tensor | None = None,
    shared_bias: Tensor | None = None, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    out_norm_weight: Tensor | None = None, out_norm_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """An adapter as the released modules compute it: LayerNorm, linear, activation, linears side by side, scale, LayerNorm."""
    n = tap if norm_weight is None else F.layer_norm(tap, tap.shape[-1:], norm_weight, norm_bias)
    r = ACTIVATIONS[activation](F.linear(n, down_weight, down_bias))
    ups = ((up_weight, up_bias), (shared_weight, shared_bias))
    columns = [F.linear(r, weight, bias) for weight, bias in ups if weight is not None]
    y = scale * (torch.cat(columns, -1) if columns else r)
    return y if out_norm_weight is None else F.layer_norm(y, y.shape[-1:], out_norm_weight, out_norm_bias, out_norm_eps)


def composed(call: Call) -> Tensor:
    """The equation in torch's own functions, in the taps' dtype; parameters of another are cast to it, as by autocast."""
    total = sum(call.tensors[name] for name in call.bases)
    for i in range(len(call.adapters)):
        given = call.adapter(i)
        total = total + one(**{n: v.to(given["tap"].dtype) if isinstance(v, Tensor) else v for n, v in given.items()})
    return total


def results(function: Function, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """out, and for `grad` of it the gradient of every tensor that requires one."""
    out, wanted = function(call), call.trained
    gradients = torch.autograd.grad(out, list(wanted.values()), few_bits(out) if grad is None else grad)
    return {"out": out.detach()} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)


VEA = Spec(norm=True, scale=0.1)
IEA = Spec(own=0, shared=8)
LEA = Spec(norm=True, scale=0.1, out_norm=True, out_norm_eps=1e-12)
TEXT_IEA = Spec(own=5, shared=3, out_norm=True, out_norm_eps=1e-12)
LINEAR = Spec(hidden=8, own=0, activation="identity")
KINDS = {
    "plain": Spec(),
    "without biases": Spec(biases=False, scale=0.1),
    "vision expert": VEA,
    "vision interaction": IEA,
    "text expert": LEA,
    "text interaction": TEXT_IEA,
    "linear": LINEAR,
    "linear with everything": Spec(hidden=8, own=0, norm=True, scale=-1.5, out_norm=True),
    "norms without biases": Spec(norm=True, norm_bias=False, biases=False, out_norm=True, out_bias=False, scale=2.0),
}


def tower(kind: str, width: int, hidden: int, shared: int, layers: int = 6) -> list[Spec]:
    """M2IST's adapters of the "vision" or the "text" tower, those of a layer together."""
    expert, interaction = (VEA, IEA) if kind == "vision" else (LEA, TEXT_IEA)
    sizes = {"depth": width, "hidden": hidden}
    pair = replace(interaction, own=width - shared, shared=shared, **sizes), replace(expert, own=width, **sizes)
    return [*pair] * layers
