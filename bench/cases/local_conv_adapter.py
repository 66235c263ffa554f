"""One local convolution adapter in inference: no gradient is wanted, so there is no backward.

y = scale * (gelu(conv(x D^T + d)) U^T + b) + residual,      x and y (batch, 1 + side^2, width), D (hidden, width)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import CHANNELS_LAST, EAGER, FASTADAPT, ONE_BY_ONE, Case, Work
from bench.cases import functional
from bench.cases.common import sizes
from bench.cases.functional import Normal, Tensors, Workload

SCALE = 0.1


@dataclass(frozen=True)
class Shape:
    """Samples, the side of their square grid, width of x and y, the hidden's, the side of the kernel; one of PRECISIONS.

    residual: whether one is added.
    """

    batch: int
    side: int
    width: int = 768
    hidden: int = 64
    kernel: int = 3
    residual: bool = True
    precision: str = "bf16"

    @property
    def name(self) -> str:
        tokens = f"{self.batch}x(1+{self.side}x{self.side})x{self.width}->{self.hidden}"
        extras = [f"{self.kernel}x{self.kernel}", *(["residual"] if self.residual else []), self.precision]
        return f"local_conv_adapter {tokens}, {', '.join(extras)}"

    @property
    def tokens(self) -> tuple[int, int]:
        return self.batch, 1 + self.side**2


# fixed before anything was measured
SHAPES = (
    Shape(32, 37),  # DINOv2 at 518 pixels
    Shape(32, 37, residual=False),  # expected to gain least
    Shape(32, 37, hidden=128),
    Shape(32, 37, 1024, 256),  # expected to lose: the products outweigh the passes over memory
    Shape(32, 37, kernel=7),
    Shape(32, 14),  # ViT-B at 224 pixels
    Shape(1, 14),
    *(Shape(32, 37, precision=precision) for precision in ("fp16", "autocast")),
)
REDUCED_SHAPES = (Shape(2, 14, precision="fp32"),)


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    x = (*shape.tokens, shape.width)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations={name: constant(*x) for name in ("x", *(["residual"] if shape.residual else []))},
        parameters={
            "down_weight": constant(shape.hidden, shape.width, std=shape.width**-0.5),
            "down_bias": constant(shape.hidden),
            "taps": constant(shape.kernel, shape.kernel, shape.hidden, std=1 / shape.kernel),
            "conv_bias": constant(shape.hidden),
            "up_weight": constant(shape.width, shape.hidden, std=shape.hidden**-0.5),
            "up_bias": constant(shape.width),
        },
        results={"y": x},
        arms={
            EAGER: lambda tensors: eager(shape, tensors),
            CHANNELS_LAST: lambda tensors: channels_last(shape, tensors),
            ONE_BY_ONE: lambda tensors: one_by_one(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: channels_last(shape, tensors),
        work={"forward": forward_work(shape)},
    )
    return functional.case(workload)


def constant(*shape: int, std: float = 1.0) -> Normal:
    return Normal(shape, std, requires_grad=False)


def eager(shape: Shape, tensors: Tensors) -> Tensors:
    """torch's functions, its convolution of an image in its own memory."""
    hidden = down(tensors)
    return up(tensors, with_cls(hidden, convolved(shape, tensors, image(shape, hidden).contiguous())))


def channels_last(shape: Shape, tensors: Tensors) -> Tensors:
    """torch's functions, its convolution of the tokens as they lie."""
    hidden = down(tensors)
    return up(tensors, with_cls(hidden, convolved(shape, tensors, image(shape, hidden))))


def one_by_one(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's convolution between torch's products."""
    weight, bias = tensors["taps"].permute(2, 0, 1), tensors["conv_bias"]
    return up(tensors, fastadapt.local_dwconv(down(tensors), weight, bias, grid=(shape.side, shape.side)))


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    names = {name: tensor for name, tensor in tensors.items() if name != "taps"}
    weight = tensors["taps"].permute(2, 0, 1)
    return {"y": fastadapt.local_conv_adapter(**names, weight=weight, grid=(shape.side, shape.side), scale=SCALE)}


def down(tensors: Tensors) -> Tensor:
    """The hidden before the convolution."""
    return F.linear(tensors["x"], tensors["down_weight"], tensors["down_bias"])


def up(tensors: Tensors, hidden: Tensor) -> Tensors:
    """The result from the hidden behind the convolution."""
    y = F.linear(F.gelu(hidden), tensors["up_weight"], tensors["up_bias"])
    return {"y": torch.add(tensors["residual"], y, alpha=SCALE) if "residual" in tensors else SCALE * y}


def image(shape: Shape, hidden: Tensor) -> Tensor:
    """The patches as a (batch, hidden, side, side) view."""
    return hidden[:, 1:].transpose(1, 2).unflatten(2, (shape.side, shape.side))


def convolved(shape: Shape, tensors: Tensors, image: Tensor) -> Tensor:
    """The image's depthwise convolution."""
    weight = tensors["taps"].permute(2, 0, 1).unsqueeze(1)
    return F.conv2d(image, weight, tensors["conv_bias"], padding=shape.kernel // 2, groups=shape.hidden)


def with_cls(hidden: Tensor, image: Tensor) -> Tensor:
    """The class token, and behind it the image as tokens."""
    return torch.cat([hidden[:, :1], image.flatten(2).transpose(1, 2)], 1)


def forward_work(shape: Shape) -> Work:
    """2 M K h for each product, 2 k^2 a number of the convolved hidden; x, the residual, y and the parameters once each."""
    rows, (size, weight_size) = shape.batch * shape.tokens[1], sizes(shape.precision)
    products = 4 * rows * shape.width * shape.hidden
    convolution = 2 * shape.kernel**2 * shape.batch * shape.side**2 * shape.hidden
    parameters = shape.hidden * (2 * shape.width + shape.kernel**2 + 2) + shape.width
    return Work(products + convolution, size * rows * shape.width * (2 + shape.residual) + weight_size * parameters)
