"""ETRIS's light Interactor: image tokens and words, each multiplied by its attention over the other.

x' = x o MHA_0(x over y)          y' = y o MHA_1(y over x),          x (batch, tokens, width), y (batch, words, width)

The released code keeps tokens first, (tokens, batch, width), and so do the arms that are built of torch's attention; fastadapt
keeps samples first.  Each gets its inputs as it wants them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import COMPILED, FASTADAPT, RELEASED, SDPA, Case, Work
from bench.cases import functional
from bench.cases.common import sizes
from bench.cases.functional import Normal, Tensors, Workload

# of each direction, as nn.MultiheadAttention has them
PARAMETERS = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")


@dataclass(frozen=True)
class Shape:
    """Samples, image tokens and words of each; width and heads that share it; one of PRECISIONS."""

    batch: int
    tokens: int
    words: int
    width: int = 64
    num_heads: int = 8
    precision: str = "fp16"

    @property
    def name(self) -> str:
        heads = f"{self.num_heads} heads of {self.width // self.num_heads}"
        return f"light_interaction {self.batch}x{self.tokens} and {self.words} words, {heads}, {self.precision}"


# fixed before anything was measured: 416 pixels, the texts of RefCOCO and of RefCOCOg, ladders of 64 and 128
SHAPES = (
    Shape(32, 676, 17),
    Shape(32, 676, 17, precision="bf16"),
    Shape(32, 676, 22),
    Shape(32, 676, 17, width=128),
    Shape(32, 676, 17, precision="fp32"),
    Shape(32, 676, 17, precision="autocast"),
)
REDUCED_SHAPES = (
    Shape(2, 676, 17, precision="fp32"),
    Shape(2, 676, 17, precision="autocast"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    d = shape.width
    activations = {"x": Normal((shape.batch, shape.tokens, d)), "y": Normal((shape.batch, shape.words, d))}
    tensors = (Normal((3 * d, d), std=d**-0.5), Normal((3 * d,)), Normal((d, d), std=d**-0.5), Normal((d,)))
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations=activations,
        parameters={f"{name}[{i}]": normal for i in range(2) for name, normal in zip(PARAMETERS, tensors)},
        results={"x'": activations["x"].shape, "y'": activations["y"].shape},
        arms={
            RELEASED: lambda tensors: composed(shape, tensors, need_weights=True),
            SDPA: lambda tensors: composed(shape, tensors, need_weights=False),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: composed(shape, tensors, need_weights=False),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
        layouts={arm: tokens_first for arm in (RELEASED, SDPA, COMPILED)},
    )
    return functional.case(workload)


def composed(shape: Shape, tensors: Tensors, need_weights: bool) -> Tensors:
    """What two nn.MultiheadAttention modules call; with need_weights, their default, they return attention maps too."""
    x, y = tensors["x"], tensors["y"]

    def attended(query: Tensor, key: Tensor, direction: int) -> Tensor:
        in_weight, in_bias, out_weight, out_bias = (tensors[f"{name}[{direction}]"] for name in PARAMETERS)
        projection = {"in_proj_weight": in_weight, "in_proj_bias": in_bias, "bias_k": None, "bias_v": None}
        projection |= {"out_proj_weight": out_weight, "out_proj_bias": out_bias}
        options = {"add_zero_attn": False, "dropout_p": 0.0, "need_weights": need_weights}
        return F.multi_head_attention_forward(query, key, key, shape.width, shape.num_heads, **projection, **options)[0]

    return {"x'": x * attended(x, y, 0), "y'": y * attended(y, x, 1)}


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    x, y = tensors["x"], tensors["y"]
    parameters = ([tensors[f"{name}[{i}]"] for i in range(2)] for name in PARAMETERS)
    both = fastadapt.light_interaction(x, y, *parameters, num_heads=shape.num_heads)
    return dict(zip(("x'", "y'"), both))


def tokens_first(tensor: Tensor) -> Tensor:
    """(batch, tokens, width) as (tokens, batch, width) and back, in memory too."""
    return tensor.transpose(0, 1).contiguous()


def forward_work(shape: Shape) -> Work:
    """8 d^2 for each token and word, as a query, as key and value, and out; 8 d for each pair of the two.

    x, y, x', y' and the parameters once each.
    """
    rows, pairs, size, weights = _parts(shape)
    return Work(8 * shape.width**2 * rows + 8 * shape.width * pairs, 2 * size * rows * shape.width + weights)


def backward_work(shape: Shape) -> Work:
    """Twice the forward's operations; x, y, the gradients of all four, the parameters and their gradients once each."""
    rows, _, size, weights = _parts(shape)
    return Work(2 * forward_work(shape).flops, 3 * size * rows * shape.width + 2 * weights)


def _parts(shape: Shape) -> tuple[int, int, int, int]:
    """Tokens and words of all samples, pairs of the two, bytes of an element of x, and bytes of all parameters."""
    size, weight_size = sizes(shape.precision)
    rows, pairs = shape.batch * (shape.tokens + shape.words), shape.batch * shape.tokens * shape.words
    return rows, pairs, size, weight_size * 2 * (4 * shape.width**2 + 4 * shape.width)
