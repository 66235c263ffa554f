"""M2IST's side adapters of one tower, six layers, and their sum with what the tower ends and begins with.

vision: out = E + S + sum_i relu(m_i D^T + d) S_i^T + s_i + 0.1 (relu(LN(f_i) D^T + d) U^T + u)
text:   out = H + X + sum_i LN([r U^T + u | r S_i^T + s_i]) + LN(0.1 (relu(LN(g_i) D^T + d) U^T + u)),   r = relu(a_i D^T + d)

Taps and bases (batch, tokens, width) require no gradient.  The released modules run one by one, and their results are summed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

import fastadapt
from bench.case import FASTADAPT, ONE_BY_ONE, RELEASED, STACKED, Case, Work
from bench.cases import functional
from bench.cases.common import sizes
from bench.cases.functional import Normal, Tensors, Workload

SHARED, HIDDEN, SCALE, OUT_EPS = 256, 128, 0.1, 1e-12
WIDTHS = {"vision": 256, "text": 768}
KINDS = {"interaction": 1.0, "expert": SCALE}  # of adapters, and their scale


@dataclass(frozen=True)
class Shape:
    """The tower; samples, tokens of each; layers, of two adapters each; one of PRECISIONS; a backend, None for the choice."""

    tower: str
    batch: int
    tokens: int
    layers: int = 6
    precision: str = "bf16"
    backend: str | None = None

    @property
    def name(self) -> str:
        backend = f", {self.backend}" if self.backend else ""
        return f"side_fusion {self.tower} {self.batch}x{self.tokens}, {2 * self.layers} adapters, {self.precision}{backend}"

    @property
    def width(self) -> int:
        return WIDTHS[self.tower]

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


# fixed before anything was measured: M2IST's batch, half of it, the texts of RefCOCOg
SHAPES = (
    Shape("vision", 64, 400),
    Shape("text", 64, 20),
    Shape("vision", 64, 400, backend="triton"),
    Shape("text", 64, 20, backend="triton"),
    Shape("vision", 32, 400),
    Shape("text", 64, 40),
    *(Shape(tower, 64, n, precision=p) for tower, n in (("vision", 400), ("text", 20)) for p in ("fp16", "fp32", "autocast")),
)
REDUCED_SHAPES = (
    Shape("vision", 1, 400, precision="fp32"),
    Shape("text", 4, 20, precision="fp32"),
)


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    tokens = (shape.batch, shape.tokens, shape.width)
    taps = [f"{kind}{i} tap" for i in range(shape.layers) for kind in KINDS]
    forward = forward_work(shape)
    workload = Workload(
        name=shape.name,
        params=asdict(shape),
        precision=shape.precision,
        activations={name: Normal(tokens, requires_grad=False) for name in ("base 0", "base 1", *taps)},
        parameters=parameters(shape),
        results={"out": tokens},
        arms={
            RELEASED: lambda tensors: released(shape, tensors),
            STACKED: lambda tensors: stacked(shape, tensors),
            ONE_BY_ONE: lambda tensors: one_by_one(shape, tensors),
            FASTADAPT: lambda tensors: fused(shape, tensors),
        },
        compiled=lambda tensors: released(shape, tensors),
        work={"forward": forward, "forward+backward": forward + backward_work(shape)},
    )
    return functional.case(workload)


def parameters(shape: Shape) -> dict[str, Normal]:
    """By "interaction0 down_weight" and so on, SideTap's names; the text tower's LayerNorms are frozen."""
    width, own = shape.width, shape.width - SHARED
    found = {}
    for i in range(shape.layers):
        for kind in KINDS:
            ups = {"up": width} if kind == "expert" else {"shared": SHARED} | ({"up": own} if own else {})
            adapter = {"down_weight": Normal((HIDDEN, width), std=width**-0.5), "down_bias": Normal((HIDDEN,))}
            for name, columns in ups.items():
                adapter |= {f"{name}_weight": Normal((columns, HIDDEN), std=HIDDEN**-0.5), f"{name}_bias": Normal((columns,))}
            if kind == "expert":
                adapter |= {f"norm_{role}": Normal((width,)) for role in ("weight", "bias")}
            if shape.tower == "text":
                adapter |= {f"out_norm_{role}": Normal((width,), requires_grad=False) for role in ("weight", "bias")}
            found |= {f"{kind}{i} {name}": normal for name, normal in adapter.items()}
    return found


def adapters(shape: Shape, tensors: Tensors, kind: str) -> list[Tensors]:
    """The tensors of the adapters of a kind, layer by layer, by SideTap's names."""
    found: list[Tensors] = [{} for _ in range(shape.layers)]
    for name, tensor in tensors.items():
        place, field = name.split()
        if place.startswith(kind):
            found[int(place.removeprefix(kind))][field] = tensor
    return found


def hidden(adapter: Tensors) -> Tensor:
    x = adapter["tap"]
    if "norm_weight" in adapter:
        x = F.layer_norm(x, x.shape[-1:], adapter["norm_weight"], adapter["norm_bias"])
    return F.relu(F.linear(x, adapter["down_weight"], adapter["down_bias"]))


def out_norm(adapter: Tensors, y: Tensor) -> Tensor:
    if "out_norm_weight" not in adapter:
        return y
    return F.layer_norm(y, y.shape[-1:], adapter["out_norm_weight"], adapter["out_norm_bias"], OUT_EPS)


def up(adapter: Tensors) -> tuple[Tensor, Tensor]:
    """The weight and bias of one up-projection to all columns."""
    roles = [role for role in ("up", "shared") if f"{role}_weight" in adapter]
    weights, biases = ([adapter[f"{role}_{what}"] for role in roles] for what in ("weight", "bias"))
    return (weights[0], biases[0]) if len(roles) == 1 else (torch.cat(weights), torch.cat(biases))


def released(shape: Shape, tensors: Tensors) -> Tensors:
    """Adapter by adapter as the released modules compute it, results in lists, which are summed."""

    def interaction(adapter: Tensors) -> Tensor:
        r = hidden(adapter)
        y = F.linear(r, adapter["shared_weight"], adapter["shared_bias"])
        if "up_weight" in adapter:
            y = torch.cat((F.linear(r, adapter["up_weight"], adapter["up_bias"]), y), -1)
        return out_norm(adapter, y)

    def expert(adapter: Tensors) -> Tensor:
        return out_norm(adapter, SCALE * F.linear(hidden(adapter), adapter["up_weight"], adapter["up_bias"]))

    sides = [interaction(adapter) for adapter in adapters(shape, tensors, "interaction")]
    sides += [expert(adapter) for adapter in adapters(shape, tensors, "expert")]
    return {"out": tensors["base 0"] + tensors["base 1"] + sum(sides)}


def stacked(shape: Shape, tensors: Tensors) -> Tensors:
    """As few and as large products as torch's functions allow: for vision one up-projection of all hidden layers."""
    both = [(adapter, scale) for kind, scale in KINDS.items() for adapter in adapters(shape, tensors, kind)]
    out = tensors["base 0"] + tensors["base 1"]
    if shape.tower == "vision":
        ups = [(scale * weight, scale * bias) for adapter, scale in both for weight, bias in [up(adapter)]]
        r = torch.cat([hidden(adapter) for adapter, _ in both], -1)
        return {"out": out + F.linear(r, torch.cat([w for w, _ in ups], 1), torch.stack([b for _, b in ups]).sum(0))}
    for adapter, scale in both:
        weight, bias = up(adapter)
        out = out + out_norm(adapter, F.linear(hidden(adapter), scale * weight, scale * bias))
    return {"out": out}


def one_by_one(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own operation for single adapters, chained by its residual, as SideAdapter does it."""
    out = tensors["base 0"] + tensors["base 1"]
    for kind, scale in KINDS.items():
        for adapter in adapters(shape, tensors, kind):
            norm = {name: adapter[name] for name in ("norm_weight", "norm_bias") if name in adapter}
            downs = adapter["tap"], adapter["down_weight"], adapter["down_bias"]
            if shape.tower == "vision":
                out = fastadapt.bottleneck_adapter(*downs, *up(adapter), **norm, scale=scale, residual=out)
            else:
                out = out + out_norm(adapter, fastadapt.bottleneck_adapter(*downs, *up(adapter), **norm, scale=scale))
    return {"out": out}


def fused(shape: Shape, tensors: Tensors) -> Tensors:
    """fastadapt's own call."""
    taps = [
        fastadapt.SideTap(**adapter, scale=scale, out_norm_eps=OUT_EPS)
        for kind, scale in KINDS.items()
        for adapter in adapters(shape, tensors, kind)
    ]
    return {"out": fastadapt.side_fusion(taps, [tensors["base 0"], tensors["base 1"]], backend=shape.backend)}


def forward_work(shape: Shape) -> Work:
    """2 T K h for each of an adapter's two products; taps, bases, parameters and out once each."""
    size, weight_size = sizes(shape.precision)
    elements, count = shape.rows * shape.width, 2 * shape.layers
    return Work(4 * count * elements * HIDDEN, size * elements * (count + 3) + weight_size * parameter_count(shape))


def backward_work(shape: Shape) -> Work:
    """2 T K h for each of dz, dW and dD; taps, dout, parameters and the gradients of those that are trained once each.

    What a call that keeps taps alone computes again is not counted: it is not needed, only cheaper than what it saves.
    """
    size, weight_size = sizes(shape.precision)
    elements, count = shape.rows * shape.width, 2 * shape.layers
    trained = sum(prod(normal.shape) for normal in parameters(shape).values() if normal.requires_grad)
    flops = 6 * count * elements * HIDDEN
    return Work(flops, size * elements * (count + 1) + weight_size * (parameter_count(shape) + trained))


def parameter_count(shape: Shape) -> int:
    """Elements of all weights, biases and LayerNorms, frozen ones included."""
    return sum(prod(normal.shape) for normal in parameters(shape).values())
