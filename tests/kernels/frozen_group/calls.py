"""Calls of frozen_group, and the same in torch's own functions, written from the equation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastadapt.core import philox
from fastadapt.kernels.frozen_group.op import Group, frozen_group
from fastadapt.native import load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("reference", "native", "triton") if load() and DEVICE.type == "cpu" else ("reference", "triton")
SHAPE, WIDTHS, RANKS = (2, 5, 24), (16, 40, 24), (4, None, 3)  # of x, of the members' outputs, and their ranks
CURVES = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


@dataclass(frozen=True)
class Call:
    """The arguments of a call; `trained` names those of the tensors that get a gradient."""

    tensors: dict[str, Tensor]
    prologue: str = "identity"
    options: dict[str, Any] = field(default_factory=dict)
    ranks: Sequence[int | None] = RANKS

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def to(self, dtype: torch.dtype) -> Call:
        tensors = {
            name: tensor if name.endswith("seed") else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def with_tensors(self, *tensors: Tensor) -> Call:
        return replace(self, tensors=dict(zip(self.tensors, tensors)))

    def member(self, g: int) -> tuple[Tensor | None, ...]:
        return tuple(self.tensors.get(f"{name}{g}") for name in ("weight", "bias", "lora_a", "lora_b"))


def make(
    prologue: str = "layer_norm",
    *,
    shape: Sequence[int] = SHAPE,
    widths: Sequence[int] = WIDTHS,
    ranks: Sequence[int | None] = RANKS,
    branch: bool = False,
    scale: bool = False,
    normed: bool = False,
    dropout: float = 0.0,
    branch_dropout: float = 0.0,
    frozen: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
) -> Call:
    """A random call; frozen: of x, branch and the factors, those without a gradient."""
    generator = torch.Generator().manual_seed(1)

    def random(*size: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).bfloat16().to(DEVICE, of)

    depth = shape[-1]
    tensors = {"x": random(*shape)}
    if branch:
        tensors["branch"] = random(*shape)
    if scale:
        tensors["branch_scale"] = random(depth)
    if prologue == "layer_norm":
        tensors |= {"norm_weight": random(depth), "norm_bias": random(depth)}
    for g, (width, rank) in enumerate(zip(widths, ranks)):
        tensors[f"weight{g}"] = random(width, depth, scale=depth**-0.5)
        if g != 1:
            tensors[f"bias{g}"] = random(width)
        if rank is not None:
            tensors[f"lora_a{g}"] = random(rank, depth, scale=depth**-0.5, of=factor_dtype or dtype)
            tensors[f"lora_b{g}"] = random(width, rank, of=factor_dtype or dtype)
    tensors |= {"seed": torch.tensor([7], device=DEVICE), "branch_seed": torch.tensor([-3], device=DEVICE)}
    for name, tensor in tensors.items():
        if (name in ("x", "branch") or name.startswith("lora")) and name not in frozen:
            tensor.requires_grad_()
    options = {"dropout_p": dropout, "branch_dropout_p": branch_dropout, "return_normed": normed}
    return Call(tensors, prologue, options, ranks)


def scales(call: Call) -> list[float]:
    return [0.5 + g for g in range(len(call.ranks))]


def fused(backend: str | None = None):
    """frozen_group on a Call."""

    def run(call: Call) -> Group:
        members = [call.member(g) for g in range(len(call.ranks))]
        names = ("seed", "branch", "branch_scale", "branch_seed", "norm_weight", "norm_bias")
        given = {name: call.tensors.get(name) for name in names}
        sequences = zip(*members) if members else ((), (), (), ())
        return frozen_group(
            call.tensors["x"], *sequences, scales=scales(call), prologue=call.prologue, **given, **call.options, backend=backend
        )

    return run


def composed(call: Call) -> Group:
    """The equation in torch's functions, with the masks that the seeds define."""
    tensors, options = call.tensors, call.options
    s, total = tensors["x"], None

    def dropped(x: Tensor, seed: str, p: float, member: int = 0) -> Tensor:
        if philox.threshold(p) == 0:
            return x
        rows = x.reshape(-1, x.shape[-1])
        return (rows * philox.keep_mask(tensors[seed], *rows.shape, p, member) * philox.inv_keep(p)).view(x.shape)

    if "branch" in tensors:
        branch = dropped(tensors["branch"], "branch_seed", options["branch_dropout_p"])
        s = total = s + (branch * tensors["branch_scale"] if "branch_scale" in tensors else branch)
    n = s
    if call.prologue == "layer_norm":
        n = F.layer_norm(s, s.shape[-1:], tensors["norm_weight"], tensors["norm_bias"])
    elif call.prologue != "identity":
        n = CURVES[call.prologue](s)
    outputs, adapted = [], 0
    for g, scale in enumerate(scales(call)):
        weight, bias, lora_a, lora_b = call.member(g)
        y = F.linear(n, weight, bias)
        if lora_a is not None:
            low = dropped(n, "seed", options["dropout_p"], adapted) @ lora_a.t().to(n.dtype)
            y = y + scale * low @ lora_b.t().to(n.dtype)
            adapted += 1
        outputs.append(y)
    return Group(total, n if options["return_normed"] else None, tuple(outputs))


def flat(group: Group) -> dict[str, Tensor]:
    found = {"total": group.total, "normed": group.normed} | {f"y{g}": y for g, y in enumerate(group.outputs)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def results(function, call: Call, unused: Sequence[str] = ()) -> dict[str, Tensor]:
    """Outputs and the gradients of what is trained, where the outputs not `unused` have different gradients."""
    outputs = flat(function(call))
    used = [y for name, y in outputs.items() if name not in unused]
    grads = [torch.linspace(-3, 3, y.numel()).view(y.shape).cos().to(y.device, y.dtype) for y in used]
    wanted = call.trained
    found = torch.autograd.grad(used, list(wanted.values()), grads, materialize_grads=True) if wanted else ()
    return {name: y.detach() for name, y in outputs.items()} | {f"d {name}": grad for name, grad in zip(wanted, found)}
