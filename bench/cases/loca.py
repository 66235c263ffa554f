"""MaPPER's local convolution adapter in training, beside a block's feed-forward network in DINOv2 at 518 pixels.

h = relu(n W1^T + b1)      y = h + [relu(BN(conv1x1(h))) | relu(BN(conv3x3(relu(BN(conv1x1(h))))))], 2 h for the class token
loca = y W2^T + b2,        n and loca (batch, 1 + side^2, 768), h and y 288 wide, convolutions to 192, 24 and 96 channels
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import EAGER, FASTADAPT, Case, Work
from bench.cases import functional
from bench.cases.common import sizes
from bench.cases.functional import Normal, Tensors, Workload

DEPTH, POINT, REDUCED, LOCAL = 768, 192, 24, 96
HIDDEN = POINT + LOCAL
EPS = 1e-3
WEIGHTS = {
    "down_weight": (HIDDEN, DEPTH),
    "point.weight": (POINT, HIDDEN, 1, 1),
    "reduce.weight": (REDUCED, HIDDEN, 1, 1),
    "local.weight": (LOCAL, REDUCED, 3, 3),
    "up_weight": (DEPTH, HIDDEN),
}
STAGES = {"point": POINT, "reduce": REDUCED, "local": LOCAL}


@dataclass(frozen=True)
class Shape:
    """Samples, patches along each side of an image; frozen: n requires no gradient; one of PRECISIONS."""

    batch: int
    side: int = 37
    frozen: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        frozen = "frozen n, " if self.frozen else ""
        return f"loca {self.batch}x{self.side}x{self.side}, {frozen}{self.precision}"

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.batch, 1 + self.side * self.side, DEPTH


# fixed before anything was measured
SHAPES = (
    Shape(32),
    Shape(32, frozen=True),  # MaPPER's first site
    Shape(8),
    *(Shape(32, precision=precision) for precision in ("fp16", "fp32", "autocast")),
)
REDUCED_SHAPES = (
    Shape(2, 14, precision="fp32"),
    Shape(2, 14, frozen=True, precision="fp32"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape; the convolutions' biases, whose gradient is zero, require none."""
    parameters = {name: Normal(size, std=prod(size[1:]) ** -0.5) for name, size in WEIGHTS.items()}
    parameters |= {"down_bias": Normal((HIDDEN,)), "up_bias": Normal((DEPTH,))}
    for stage, channels in STAGES.items():
        parameters[f"{stage}.bias"] = Normal((channels,), requires_grad=False)
        parameters |= {f"{stage}.{name}": Normal((channels,)) for name in ("norm_weight", "norm_bias")}
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations={"n": Normal(shape.tokens, requires_grad=not shape.frozen)},
        parameters=parameters,
        results={"out": shape.tokens},
        arms={
            EAGER: lambda tensors: eager(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: eager(shape, tensors),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
    )
    return functional.case(workload)


def eager(shape: Shape, tensors: Tensors) -> Tensors:
    """The equation in torch's own functions, on views of h as the released code takes them."""

    def stage(name: str, x: Tensor) -> Tensor:
        weight, bias, norm_weight, norm_bias = stage_tensors(name, tensors)
        convolved = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return F.relu(F.batch_norm(convolved, None, None, norm_weight, norm_bias, training=True, eps=EPS))

    h = F.relu(F.linear(tensors["n"], tensors["down_weight"], tensors["down_bias"]))
    patches = h[:, 1:].unflatten(1, (shape.side, shape.side)).permute(0, 3, 1, 2)
    z = torch.cat((stage("point", patches), stage("local", stage("reduce", patches))), 1)
    y = h + torch.cat((h[:, :1], z.permute(0, 2, 3, 1).flatten(1, 2)), 1)
    return {"out": F.linear(y, tensors["up_weight"], tensors["up_bias"])}


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    stages = {name: stage_tensors(name, tensors) for name in STAGES}
    others = {name: tensor for name, tensor in tensors.items() if "." not in name}
    out, _ = fastadapt.loca(**others, **stages, eps=EPS)
    return {"out": out}


def stage_tensors(stage: str, tensors: Tensors) -> list[Tensor]:
    """A convolution's weight and bias and its batch norm's."""
    return [tensors[f"{stage}.{role}"] for role in ("weight", "bias", "norm_weight", "norm_bias")]


def forward_work(shape: Shape) -> Work:
    """2 T D C for each linear, 2 a patch and element of the convolutions' weights; n, out and parameters once each."""
    size, weight_size = sizes(shape.precision)
    elements = shape.batch * shape.tokens[1] * DEPTH
    return Work(4 * elements * HIDDEN + convolution_flops(shape), 2 * size * elements + weight_size * parameter_count())


def backward_work(shape: Shape) -> Work:
    """Twice the forward's operations, less dn's where n is frozen; n, dout, dn, parameters and their gradients once each."""
    size, weight_size = sizes(shape.precision)
    elements = shape.batch * shape.tokens[1] * DEPTH
    flops = (8 - 2 * shape.frozen) * elements * HIDDEN + 2 * convolution_flops(shape)
    return Work(flops, (3 - shape.frozen) * size * elements + 2 * weight_size * parameter_count())


def convolution_flops(shape: Shape) -> int:
    """Of the three convolutions, forward."""
    weights = HIDDEN * (POINT + REDUCED) + 9 * REDUCED * LOCAL
    return 2 * shape.batch * shape.side * shape.side * weights


def parameter_count() -> int:
    """Elements of all weights, biases and batch norms' affines."""
    return sum(map(prod, WEIGHTS.values())) + HIDDEN + DEPTH + 3 * sum(STAGES.values())
