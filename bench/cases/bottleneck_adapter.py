"""One bottleneck adapter, at the widths and token counts of the methods that have one.

y = scale * (act(LN(x) D^T + d) U^T + u) + residual,      x and y (rows, width), D (hidden, width), U (width, hidden)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch.nn import functional as F

import fastadapt
from bench.case import EAGER, FASTADAPT, Case, Work
from bench.cases import functional
from bench.cases.common import DINO, REDUCED, VIT, sizes
from bench.cases.functional import Normal, Tensors, Workload

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Shape:
    """rows of x; width of x and y; the hidden's; one of ACTIVATIONS; one of PRECISIONS.

    norm: with LayerNorm; scale: a number, or "rows" for a tensor of one a row, which is trained; residual: with one that
    requires a gradient; frozen: x requires none.
    """

    rows: int
    width: int
    hidden: int
    activation: str = "relu"
    norm: bool = False
    scale: float | str = 1.0
    residual: bool = False
    frozen: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        parts = {"LN": self.norm, f"scale {self.scale}": self.scale != 1.0, "residual": self.residual, "frozen x": self.frozen}
        extras = [self.activation, *(part for part, there in parts.items() if there), self.precision]
        return f"bottleneck_adapter {self.rows}x{self.width}->{self.hidden} {', '.join(extras)}"


MAPPER_TEXT, M2IST_VISION, M2IST_TEXT = 32 * 20, 64 * 400, 64 * 20

# fixed before anything was measured: an adapter beside a frozen MLP of ViT-B and ViT-L, then those of MaPPER and M2IST
SHAPES = (
    Shape(DINO, 768, 64, scale=0.1, residual=True),
    Shape(DINO, 768, 64, norm=True, scale=0.1, residual=True),
    Shape(DINO, 768, 128, "gelu", scale=0.1, residual=True),
    Shape(DINO, 1024, 256, scale=0.1, residual=True),  # expected to lose: the products outweigh the passes over memory
    Shape(VIT, 768, 64, scale=0.1, residual=True),
    Shape(MAPPER_TEXT, 768, 32, norm=True, scale="rows", residual=True),  # DyPA
    Shape(M2IST_VISION, 256, 128, norm=True, scale=0.1, frozen=True),  # VEA
    Shape(M2IST_VISION, 256, 128, frozen=True),  # IEA
    Shape(M2IST_TEXT, 768, 128, norm=True, scale=0.1, frozen=True),  # LEA
    *(Shape(DINO, 768, 64, scale=0.1, residual=True, precision=precision) for precision in ("fp16", "fp32", "autocast")),
)
REDUCED_SHAPES = (
    Shape(REDUCED, 768, 64, scale=0.1, residual=True, precision="fp32"),
    Shape(MAPPER_TEXT, 768, 32, norm=True, scale="rows", residual=True, precision="fp32"),
    Shape(M2IST_TEXT, 768, 128, norm=True, scale=0.1, frozen=True, precision="fp32"),
    Shape(REDUCED, 768, 64, norm=True, scale=0.1, residual=True, precision="autocast"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    matrix = (shape.rows, shape.width)
    activations = {"x": Normal(matrix, requires_grad=not shape.frozen)}
    if shape.scale == "rows":
        activations["scale"] = Normal((shape.rows,))
    if shape.residual:
        activations["residual"] = Normal(matrix)
    norm = {"norm_weight": Normal((shape.width,)), "norm_bias": Normal((shape.width,))}
    adapter = {
        "down_weight": Normal((shape.hidden, shape.width), std=shape.width**-0.5),
        "down_bias": Normal((shape.hidden,)),
        "up_weight": Normal((shape.width, shape.hidden), std=shape.hidden**-0.5),
        "up_bias": Normal((shape.width,)),
    }
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations=activations,
        parameters=adapter | norm if shape.norm else adapter,
        results={"y": matrix},
        arms={
            EAGER: lambda tensors: eager(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: eager(shape, tensors),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
    )
    return functional.case(workload)


def eager(shape: Shape, tensors: Tensors) -> Tensors:
    """The equation in torch's own functions."""
    x = tensors["x"]
    if shape.norm:
        x = F.layer_norm(x, x.shape[-1:], tensors["norm_weight"], tensors["norm_bias"])
    hidden = ACTIVATIONS[shape.activation](F.linear(x, tensors["down_weight"], tensors["down_bias"]))
    y = F.linear(hidden, tensors["up_weight"], tensors["up_bias"])
    if shape.scale == "rows":
        y = tensors["scale"][:, None] * y
    elif shape.scale != 1.0:
        y = shape.scale * y
    return {"y": y + tensors["residual"] if shape.residual else y}


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    options = {"scale": shape.scale} | tensors  # where there is one a row, it is among the tensors
    y = fastadapt.bottleneck_adapter(**options, activation=shape.activation)
    return {"y": y}


def forward_work(shape: Shape) -> Work:
    """2 M K h for each of the two products; x, the residual, the scale, the parameters and y once each."""
    m, k, h = shape.rows, shape.width, shape.hidden
    size, weight_size = sizes(shape.precision)
    rows = size * m * (2 * k + k * shape.residual + (shape.scale == "rows"))
    return Work(4 * m * k * h, rows + weight_size * parameter_count(shape))


def backward_work(shape: Shape) -> Work:
    """2 M K h for each of dz, dU, dD and dx; x, dy, dx, the scale, the parameters and their gradients once each.

    A frozen x has no dx; the residual's gradient is dy itself.
    """
    m, k, h = shape.rows, shape.width, shape.hidden
    size, weight_size = sizes(shape.precision)
    rows = size * m * (2 * k + k * (not shape.frozen) + 2 * (shape.scale == "rows"))
    return Work(2 * m * k * h * (4 - shape.frozen), rows + 2 * weight_size * parameter_count(shape))


def parameter_count(shape: Shape) -> int:
    """Elements of D, U, their biases and LayerNorm's affine."""
    return 2 * shape.width * shape.hidden + shape.hidden + shape.width + 2 * shape.width * shape.norm
