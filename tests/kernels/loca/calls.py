"""Calls of loca as the tests make them, and the plain composition of torch functions that each has to equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt import loca
from fastadapt.core.launch import interpreting
from tests.tolerance import no_worse_than

SEED = 11
DEVICE = torch.device("cpu" if interpreting() else "cuda")  # where this process runs Triton kernels
randn = partial(torch.randn, device=DEVICE)
BACKENDS = ("reference", "triton")
STAGES = ("point", "reduce", "local")
ROLES = ("weight", "bias", "norm_weight", "norm_bias")
RUNNING = ("running_mean", "running_var")
SITE = ("layer_scale", "mlp", "residual")


@dataclass(frozen=True)
class Call:
    """Tensors of a call by name, those of a convolution as in "point.weight"; (H, W); eps and scale."""

    tensors: dict[str, Tensor]
    grid: tuple[int, int] | None
    eps: float = 1e-3
    scale: float = 1.0

    @property
    def training(self) -> bool:
        return "point.running_mean" not in self.tensors

    def to(self, target: torch.dtype | str) -> Call:
        """The same call with every tensor in this dtype or on this device, a leaf that requires what it did."""
        return self.with_tensors(t.detach().to(target).requires_grad_(t.requires_grad) for t in self.tensors.values())

    def with_tensors(self, tensors: Iterable[Tensor]) -> Call:
        """The same call on other tensors, given in the order of `self.tensors`."""
        return replace(self, tensors=dict(zip(self.tensors, tensors)))

    def requiring(self, *names: str) -> Call:
        """The same tensors, of which only those named require a gradient."""
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in names)
        return self


def make(
    batch: int = 2,
    grid: tuple[int, int] = (3, 5),
    depth: int = 10,
    channels: tuple[int, int, int] = (8, 3, 4),
    width: int = 10,
    *,
    training: bool = True,
    site: bool = False,
    frozen: bool = False,
    clear: bool = False,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
) -> Call:
    """A call with random tensors of unit-sized products; channels: of point, reduce and local.

    clear: whether what comes before a ReLU is far from its kink, two of three channels above and one below, so that rounding in
    16 bits turns no unit on or off, which would drown every other error.  n requires no gradient if `frozen`, nor do
    layer_scale and running statistics; everything else does.
    """
    point, reduce, local = channels
    hidden, rows, own = point + local, 1 + grid[0] * grid[1], parameter_dtype or dtype

    def shift(size: int) -> Tensor:
        return 6.0 * torch.arange(size, device=DEVICE).remainder(3).sub(0.5).sign() if clear else 0.5 * randn(size)

    tensors = {"n": randn(batch, rows, depth).to(dtype)}
    tensors |= {"down_weight": randn(hidden, depth) / depth**0.5, "down_bias": shift(hidden)}
    shapes = (point, hidden, 1, 1), (reduce, hidden, 1, 1), (local, reduce, 3, 3)
    for stage, shape in zip(STAGES, shapes):
        fan_in = shape[1] * shape[2] * shape[3]
        vectors = randn(shape[0]), 1 + 0.3 * randn(shape[0]), shift(shape[0])
        values = dict(zip(ROLES, (2 * randn(shape) / fan_in**0.5, *vectors)))
        if not training:
            values |= {"running_mean": randn(shape[0]), "running_var": 0.5 + torch.rand(shape[0], device=DEVICE)}
        tensors |= {f"{stage}.{role}": value for role, value in values.items()}
    tensors |= {"up_weight": randn(width, hidden) / hidden**0.5, "up_bias": randn(width)}
    tensors = {name: tensor if name == "n" else tensor.to(own) for name, tensor in tensors.items()}
    if site:
        tensors |= {"layer_scale": (1 + 0.5 * randn(width)).to(own), "mlp": randn(batch, rows, width).to(dtype)}
        tensors["residual"] = randn(batch, rows, width).to(dtype)
    still = {"layer_scale", *(["n"] if frozen else [])}
    trained = (name for name in tensors if name not in still and "running" not in name)
    return Call(tensors, grid, scale=0.2 if site else 1.0).requiring(*trained)


Function = Callable[[Call], Tensor]


def with_moments(call: Call, backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """What the operation returns."""
    roles = ROLES if call.training else (*ROLES, *RUNNING)
    stages = {stage: [call.tensors[f"{stage}.{role}"] for role in roles] for stage in STAGES}
    others = {name: tensor for name, tensor in call.tensors.items() if "." not in name}
    return loca(**others, **stages, grid=call.grid, eps=call.eps, scale=call.scale, backend=backend)


def fused(backend: str | None = None) -> Function:
    """The operation's first result."""
    return lambda call: with_moments(call, backend)[0]


def composed(call: Call) -> Tensor:
    """The equation in torch's own functions, in n's dtype; parameters of another are cast to it first, as autocast would."""
    n = call.tensors["n"]
    get = {name: t if name == "residual" or "norm" in name else t.to(n.dtype) for name, t in call.tensors.items()}.get

    def stage(name: str, x: Tensor) -> Tensor:
        convolved = F.conv2d(x, get(f"{name}.weight"), get(f"{name}.bias"), padding=1 if name == "local" else 0)
        running = (get(f"{name}.{role}") for role in RUNNING)
        affine = (call.tensors[f"{name}.{role}"] for role in ("norm_weight", "norm_bias"))
        return F.relu(F.batch_norm(convolved, *running, *affine, call.training, 0.0, call.eps)).to(n.dtype)

    h = F.relu(F.linear(n, get("down_weight"), get("down_bias")))
    patches = h[:, 1:].transpose(1, 2).unflatten(2, call.grid).contiguous()
    both = torch.cat((stage("point", patches), stage("local", stage("reduce", patches))), 1)
    y = h + torch.cat((h[:, :1], both.flatten(2).transpose(1, 2)), 1)
    out = F.linear(y, get("up_weight"), get("up_bias"))
    if get("residual") is None:
        return out
    return get("residual") + get("layer_scale") * (get("mlp") + call.scale * out)


def results(function: Function, call: Call, grad: Tensor | None = None) -> dict[str, Tensor]:
    """out, and for `grad` of it the gradient of every tensor that requires one."""
    out = function(call)
    wanted = {name: tensor for name, tensor in call.tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), few_bits(out) if grad is None else grad)
    return {"out": out.detach()} | {f"d {name}": gradient for name, gradient in zip(wanted, gradients)}


def few_bits(like: Tensor) -> Tensor:
    """Random numbers that every dtype holds exactly, the same for equal shapes."""
    numbers = torch.randint(-8, 9, like.shape, generator=torch.Generator().manual_seed(SEED)) / 8
    return numbers.to(like.device, like.dtype)


def as_near_as_eager(function: Function, call: Call, grad: Tensor | None = None) -> None:
    """`function` is as near to float64 as the composition in the same dtype.

    Gradients of parameters count as one tensor, in which each has the norm 1: the error of eight numbers falls as luck has it.
    """
    exact = results(composed, call.to(torch.float64), None if grad is None else grad.double())
    found = results(function, call, grad), results(composed, call, grad), exact
    assert all(one[name].shape == tensor.shape for one in found for name, tensor in exact.items())
    no_worse_than(*(pooled(one, exact, call) for one in found))


def pooled(found: dict[str, Tensor], exact: dict[str, Tensor], call: Call) -> dict[str, Tensor]:
    """`found` with the gradients of all parameters as one, less those that are zero in training but for eager's rounding."""
    inert = {f"d {stage}.bias" for stage in STAGES} if call.training else set()
    alone = {name: tensor for name, tensor in found.items() if name in ("out", "d n", "d mlp", "d residual")}
    units = [found[name].double().flatten() / exact[name].norm() for name in found if name not in alone and name not in inert]
    return alone | ({"parameters": torch.cat(units).to(found["out"].dtype)} if units else {})
