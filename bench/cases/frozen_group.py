"""A group of frozen linears with LoRA behind what a transformer block has before them: LayerNorm, or an activation.

n = LayerNorm(x) or act(x),      y_g = n W_g^T + b_g + scale n A_g^T B_g^T,      x (rows, K), W_g (N, K), A_g (r, K), B_g (N, r)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import EAGER, FASTADAPT, ONE_BY_ONE, Case, Work
from bench.cases import functional
from bench.cases.common import DINO, REDUCED, VIT, sizes
from bench.cases.functional import Normal, Tensors, Workload

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda z: z * (1.702 * z).sigmoid()}
SCALE = 1.0


@dataclass(frozen=True)
class Shape:
    """rows of x; width K and outputs N of each of the members; "layer_norm" or one of ACTIVATIONS; r; one of PRECISIONS."""

    rows: int
    prologue: str = "layer_norm"
    width: int = 768
    outputs: int = 768
    members: int = 3
    r: int = 16
    precision: str = "bf16"

    @property
    def name(self) -> str:
        return (
            f"frozen_group {self.rows}x{self.width}, {self.prologue} -> {self.members} x {self.outputs}, r {self.r}, "
            f"{self.precision}"
        )


def mlp(rows: int, prologue: str = "quick_gelu", precision: str = "bf16") -> Shape:
    """The activation and fc2 of a ViT-B."""
    return Shape(rows, prologue, width=3072, members=1, precision=precision)


# fixed before anything was measured: q, k and v after LayerNorm, and fc2 after the activation, of a ViT-B
SHAPES = (
    *(shape for rows in (VIT, DINO) for shape in (Shape(rows), mlp(rows), mlp(rows, "gelu"))),
    *(Shape(VIT, precision=precision) for precision in ("fp16", "fp32", "autocast")),
    mlp(VIT, precision="autocast"),
)
REDUCED_SHAPES = (
    Shape(REDUCED, precision="fp32"),
    mlp(REDUCED, precision="fp32"),
    Shape(REDUCED, precision="autocast"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape; without dropout."""
    parameters = {}
    if shape.prologue == "layer_norm":
        parameters |= {name: Normal((shape.width,), requires_grad=False) for name in ("norm_weight", "norm_bias")}
    for g in range(shape.members):
        parameters |= {
            f"weight{g}": Normal((shape.outputs, shape.width), std=shape.width**-0.5, requires_grad=False),
            f"bias{g}": Normal((shape.outputs,), requires_grad=False),
            f"lora_a{g}": Normal((shape.r, shape.width), std=shape.width**-0.5),
            f"lora_b{g}": Normal((shape.outputs, shape.r), std=shape.r**-0.5),
        }
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations={"x": Normal((shape.rows, shape.width))},
        parameters=parameters,
        results={f"y{g}": (shape.rows, shape.outputs) for g in range(shape.members)},
        arms={
            EAGER: lambda tensors: eager(shape, tensors),
            ONE_BY_ONE: lambda tensors: one_by_one(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: eager(shape, tensors),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
    )
    return functional.case(workload)


def eager(shape: Shape, tensors: Tensors) -> Tensors:
    """The equation in torch's own functions."""
    n = before(shape, tensors)

    def linear(weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return F.linear(n, weight, bias) + SCALE * F.linear(F.linear(n, lora_a), lora_b)

    return {f"y{g}": linear(*member(tensors, g)) for g in range(shape.members)}


def one_by_one(shape: Shape, tensors: Tensors) -> Tensors:
    """torch's LayerNorm or activation, and fastadapt's LoRA linears on what it returns."""
    n = before(shape, tensors)
    outputs = fastadapt.lora_linear_group(n, *members(shape, tensors), scales=[SCALE] * shape.members)
    return {f"y{g}": y for g, y in enumerate(outputs)}


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    norm = {name: tensors.get(name) for name in ("norm_weight", "norm_bias")}
    found = fastadapt.frozen_group(
        tensors["x"], *members(shape, tensors), scales=[SCALE] * shape.members, prologue=shape.prologue, **norm
    )
    return {f"y{g}": y for g, y in enumerate(found.outputs)}


def before(shape: Shape, tensors: Tensors) -> Tensor:
    """n."""
    x = tensors["x"]
    if shape.prologue == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], tensors["norm_weight"], tensors["norm_bias"])
    return ACTIVATIONS[shape.prologue](x)


def member(tensors: Tensors, g: int) -> tuple[Tensor, ...]:
    """W_g, b_g, A_g and B_g."""
    return tuple(tensors[f"{name}{g}"] for name in ("weight", "bias", "lora_a", "lora_b"))


def members(shape: Shape, tensors: Tensors) -> zip:
    """All W, all b, all A and all B."""
    return zip(*(member(tensors, g) for g in range(shape.members)))


def forward_work(shape: Shape) -> Work:
    """2 M K N and 2 M r (K + N) for each member; x, the parameters and every y once each."""
    size, weight_size = sizes(shape.precision)
    rows = size * shape.rows * (shape.width + shape.members * shape.outputs)
    return Work(linears(shape) + low_rank(shape), rows + weight_size * (frozen_count(shape) + factor_count(shape)))


def backward_work(shape: Shape) -> Work:
    """dy W for each member, and twice the low-rank products; x, every dy, dx, the weights, the factors and their gradients
    once each."""
    size, weight_size = sizes(shape.precision)
    rows = size * shape.rows * (2 * shape.width + shape.members * shape.outputs)
    biases = shape.members * shape.outputs
    parameters = frozen_count(shape) - biases + 2 * factor_count(shape)
    return Work(linears(shape) + 2 * low_rank(shape), rows + weight_size * parameters)


def linears(shape: Shape) -> int:
    return 2 * shape.rows * shape.width * shape.outputs * shape.members


def low_rank(shape: Shape) -> int:
    return 2 * shape.rows * shape.r * (shape.width + shape.outputs) * shape.members


def frozen_count(shape: Shape) -> int:
    """Elements of the weights, the biases and LayerNorm's affine."""
    return shape.members * shape.outputs * (shape.width + 1) + 2 * shape.width * (shape.prologue == "layer_norm")


def factor_count(shape: Shape) -> int:
    """Elements of every A and B."""
    return shape.members * shape.r * (shape.width + shape.outputs)
