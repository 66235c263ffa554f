"""Depthwise convolutions over the tokens of an image, at the widths of ViTs and of their adapters.

y = conv(x) over the grid of patches, and x where it is the prefix token,      x and y (batch, 1 + height * width, channels)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import CHANNELS_LAST, CUDNN_ARMS, EAGER, FASTADAPT, Arm, Case, Unavailable, Work
from bench.cases import functional
from bench.cases.common import sizes
from bench.cases.functional import Normal, Tensors, Workload


@dataclass(frozen=True)
class Shape:
    """Samples, the side of their square grid, channels, the side of the kernel; one of PRECISIONS."""

    batch: int
    side: int
    channels: int
    kernel: int = 3
    precision: str = "bf16"

    @property
    def name(self) -> str:
        tokens = f"{self.batch}x(1+{self.side}x{self.side})x{self.channels}"
        return f"local_dwconv {tokens}, {self.kernel}x{self.kernel}, {self.precision}"


# fixed before anything was measured
SHAPES = (
    Shape(32, 37, 768),  # DINOv2 at 518 pixels
    Shape(32, 37, 768, 5),
    Shape(32, 37, 768, 7),  # expected to lose against a copy: the products outweigh the passes over memory
    Shape(32, 37, 128),  # the hidden of an adapter
    Shape(32, 37, 64),
    Shape(32, 14, 768),  # ViT-B at 224 pixels
    Shape(32, 14, 64),
    *(Shape(32, 37, 768, precision=precision) for precision in ("fp16", "fp32", "autocast")),
)
REDUCED_SHAPES = (
    Shape(2, 14, 768, precision="fp32"),
    Shape(2, 14, 64, 5, "fp32"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    tokens = Normal((shape.batch, 1 + shape.side**2, shape.channels))
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations={"x": tokens},
        parameters={
            "weight": Normal((shape.channels, shape.kernel, shape.kernel), std=1 / shape.kernel),
            "bias": Normal((shape.channels,)),
        },
        results={"y": tokens.shape},
        arms={
            EAGER: lambda tensors: eager(shape, tensors),
            CHANNELS_LAST: lambda tensors: channels_last(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: channels_last(shape, tensors),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
    )
    plain = functional.case(workload)
    swept = {name: partial(on_cudnn, plain.arms[layout], options) for name, (layout, options) in CUDNN_ARMS.items()}
    return replace(plain, arms=plain.arms | swept)


def eager(shape: Shape, tensors: Tensors) -> Tensors:
    """torch's convolution of an image in its own memory, to and fro."""
    return convolved(shape, tensors, image(shape, tensors).contiguous())


def channels_last(shape: Shape, tensors: Tensors) -> Tensors:
    """torch's convolution of the tokens as they lie."""
    return convolved(shape, tensors, image(shape, tensors))


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    return {"y": fastadapt.local_dwconv(**tensors, grid=(shape.side, shape.side))}


def on_cudnn(build: Callable[[Any], Arm], options: Mapping[str, Any], inputs: functional.Inputs) -> Arm:
    """The arm under these settings of torch.backends.cudnn; raises Unavailable where they mean nothing."""
    if inputs.device.type != "cuda":
        raise Unavailable("settings of torch.backends.cudnn are for CUDA devices alone")
    if missing := [name for name in options if not hasattr(torch.backends.cudnn, name)]:
        raise Unavailable(f"this torch has no torch.backends.cudnn.{missing[0]}")
    return under_cudnn(build(inputs), options)


def under_cudnn(arm: Arm, options: Mapping[str, Any]) -> Arm:
    """The arm, each of whose functions runs under these settings of torch.backends.cudnn."""

    @contextmanager
    def settings() -> Iterator[None]:
        before = {name: getattr(torch.backends.cudnn, name) for name in options}
        try:
            for name, value in options.items():
                setattr(torch.backends.cudnn, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(torch.backends.cudnn, name, value)

    return replace(arm, **{name: settings()(getattr(arm, name)) for name in ("forward", "backward", "outputs")})


def image(shape: Shape, tensors: Tensors) -> Tensor:
    """The patches as a (batch, channels, side, side) view."""
    return tensors["x"][:, 1:].transpose(1, 2).unflatten(2, (shape.side, shape.side))


def convolved(shape: Shape, tensors: Tensors, image: Tensor) -> Tensors:
    """The prefix token, and behind it the image's convolution as tokens."""
    weight, bias = tensors["weight"].unsqueeze(1), tensors["bias"]
    result = F.conv2d(image, weight, bias, padding=shape.kernel // 2, groups=shape.channels)
    return {"y": torch.cat([tensors["x"][:, :1], result.flatten(2).transpose(1, 2)], 1)}


def forward_work(shape: Shape) -> Work:
    """2 k^2 a number of y; x, y, weight and bias once each."""
    tokens, parameters, flops = _parts(shape)
    return Work(flops, 2 * tokens + parameters)


def backward_work(shape: Shape) -> Work:
    """2 k^2 a number for each of dX and dW; x, dY, dX, weight and the parameters' gradients once each."""
    tokens, parameters, flops = _parts(shape)
    return Work(2 * flops, 3 * tokens + 2 * parameters)


def _parts(shape: Shape) -> tuple[int, int, int]:
    """Bytes of x, bytes of the parameters, and operations of one convolution."""
    size, weight_size = sizes(shape.precision)
    patches, taps = shape.batch * shape.side**2 * shape.channels, shape.kernel**2
    tokens = size * shape.batch * (1 + shape.side**2) * shape.channels
    return tokens, weight_size * shape.channels * (taps + 1), 2 * patches * taps
