"""The calls of loca that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadapt.kernels.loca.op import loca
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("triton",)
STAGES = ("point", "reduce", "local")
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Case:
    """n (batch, 1 + height * width, depth) through convolutions of `channels`, in the order of STAGES.

    training: whether statistics are the batch's; site: with layer_scale, mlp and residual; frozen: n needs no gradient;
    precision: a key of PRECISIONS.
    """

    batch: int
    height: int
    width: int
    depth: int = 768
    channels: tuple[int, int, int] = (192, 24, 96)
    training: bool = True
    site: bool = True
    frozen: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        mode = "train" if self.training else "eval"
        extras = [name for name in ("site", "frozen") if getattr(self, name)]
        sizes = "-".join(map(str, self.channels))
        return " ".join([f"{self.batch}x{self.height}x{self.width}x{self.depth} {sizes}", mode, *extras, self.precision])


SHIPPED = (
    Case(32, 37, 37),  # MaPPER: DINOv2 at 518 pixels
    Case(32, 37, 37, frozen=True),  # its first site
    Case(32, 37, 37, site=False, precision="fp16"),
    Case(32, 37, 37, training=False),
    Case(32, 37, 37, precision="autocast"),
    Case(32, 37, 37, precision="tf32"),
)

EDGES = (
    Case(2, 3, 5, 10, (24, 17, 31), precision="fp32"),
    Case(2, 3, 5, 10, (24, 17, 31), precision="tf32"),
    Case(1, 9, 8, 40, (33, 9, 17), site=False, precision="tf32"),
    Case(3, 7, 7, 48, (32, 8, 16), training=False, precision="tf32"),
    Case(4, 9, 8, 48, (48, 16, 32), frozen=True, precision="autocast"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """n, the adapter's parameters, those of a convolution as in "point.weight", and those of the site.

    In 16 bits what comes before a ReLU is far from its kink: rounding that turns units on or off would drown every other error.
    """
    dtype, autocast, _ = PRECISIONS[case.precision]
    shape = case.batch, 1 + case.height * case.width, case.depth
    point, reduce, local = case.channels
    hidden = point + local
    distance = 6.0 if (autocast or dtype).itemsize == 2 else 0.3

    def random(*shape: int, fan_in: float = 1.0, shift: float | Tensor = 0.0) -> Tensor:
        return (shift + torch.randn(shape, device=device) * fan_in**-0.5).to(dtype).requires_grad_()

    def on_or_off(channels: int) -> Tensor:
        side = torch.where(torch.arange(channels, device=device) % 3 == 0, -1.0, 1.0)
        return random(channels, fan_in=16.0, shift=distance * side)

    tensors = {
        "n": random(*shape).requires_grad_(not case.frozen),
        "down_weight": random(hidden, case.depth, fan_in=case.depth),
        "down_bias": on_or_off(hidden),
    }
    shapes = (point, hidden, 1, 1), (reduce, hidden, 1, 1), (local, reduce, 3, 3)
    for stage, size in zip(STAGES, shapes):
        fan_in = size[1] * size[2] * size[3]
        tensors[f"{stage}.weight"] = random(*size, fan_in=fan_in)
        bias = random(size[0]).requires_grad_(not case.training)  # in training its gradient is zero
        tensors |= {f"{stage}.bias": bias, f"{stage}.norm_weight": random(size[0], fan_in=16.0, shift=1.0)}
        tensors[f"{stage}.norm_bias"] = on_or_off(size[0])
        if not case.training:
            running = random(size[0]), random(size[0]).detach().square() + 0.5
            tensors |= {f"{stage}.{name}": tensor.detach() for name, tensor in zip(RUNNING, running)}
    tensors |= {"up_weight": random(case.depth, hidden, fan_in=hidden), "up_bias": random(case.depth)}
    if case.site:
        tensors |= {"layer_scale": random(case.depth).detach(), "residual": random(*shape)}
        tensors["mlp"] = random(*shape).detach().to(autocast or dtype).requires_grad_()
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """out, in training the moments, and the gradients of the tensors that require one."""
    roles = ("weight", "bias", "norm_weight", "norm_bias", *(() if case.training else RUNNING))
    stages = {stage: [tensors[f"{stage}.{role}"] for role in roles] for stage in STAGES}
    others = {name: tensor for name, tensor in tensors.items() if "." not in name}
    torch.manual_seed(0)
    with computing(case.precision, tensors["n"]):
        grid, scale = (case.height, case.width), 0.2 if case.site else 1.0
        out, moments = loca(**others, **stages, grid=grid, scale=scale, backend=backend)
        found = outputs_and_gradients({"out": out}, tensors)
    return found | {"moments": moments} if case.training else found


# of a kernel's loads, those of 16 bytes: vectors of a channel each and the 3x3 weight are read in smaller pieces
WIDE_SHARES = {
    "inference_kernel": 0.3,
    "hidden_kernel": 0.3,
    "local_kernel": 0.05,
    "output_kernel": 0.7,
    "output_grad_kernel": 0.5,
    "local_grad_kernel": 0.3,
    "hidden_grad_kernel": 0.5,
    "weight_grads_kernel": 0.9,
    "local_weight_grad_kernel": 0.3,
}


def budget(case: Case, kernel: str) -> Budget:
    """What every kernel can have in 16 bits; float32 and rows that start anywhere take tiles of 16 rows."""
    if kernel == "prepare_kernel":
        return Budget()
    sizes = case.depth, sum(case.channels[::2]), case.channels[2]
    dtype, autocast, _ = PRECISIONS[case.precision]
    if (autocast or dtype).itemsize == 4 or any(size % 16 for size in sizes):
        return Budget(tensor_core=True, few_rows=True)
    return Budget(tensor_core=True, min_load_bytes=16, min_store_bytes=16, min_wide_load_share=WIDE_SHARES[kernel])
