"""One LoRA linear, or query, key and value together, at the widths and token counts of ViT-B and ViT-L.

y_g = x W_g^T + b_g + s dropout_g(x) A_g^T B_g^T,      x (32 * tokens, K), W_g (N, K), rank r, members g
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

import fastadapt
from bench.case import ADDMM, COMPILED, FASTADAPT, FROZEN, PEFT, Arm, Case, Work
from bench.cases.addmm import AddmmLora
from bench.cases.common import DINO, PRECISIONS, REDUCED, SEED, VIT, autocasting, sizes
from bench.clocks import ROTATION
from bench.compiled import compile_in_place
from fastadapt.core import philox
from fastadapt.prove.judge import Verdict, judge, poisoned


@dataclass(frozen=True)
class Shape:
    """rows of x; K in, N out of each of `members` linears; rank; dropout; one of PRECISIONS."""

    rows: int
    k: int
    n: int
    r: int = 16
    dropout: float = 0.1
    precision: str = "bf16"
    members: int = 1

    @property
    def name(self) -> str:
        linears = f"{self.k}->{self.n}" if self.members == 1 else f"{self.k}->{self.members}x{self.n}"
        return f"lora_linear {self.rows}x{linears} r{self.r} p{self.dropout:g} {self.precision}"


# fixed before anything was measured: the widths of ViT-B and ViT-L, LoRA's usual ranks, the dtypes that training uses
SHAPES: tuple[Shape, ...] = (
    *(Shape(rows, k, n) for rows in (VIT, DINO) for k, n in ((768, 768), (768, 3072), (3072, 768))),
    *(Shape(DINO, k, n) for k, n in ((1024, 1024), (1024, 4096))),
    *(Shape(rows, 768, 768, members=3) for rows in (VIT, DINO)),
    *(Shape(DINO, 768, n, r=r) for n in (768, 3072) for r in (8, 64)),
    *(Shape(DINO, 768, n, dropout=0.0) for n in (768, 3072)),
    *(Shape(DINO, 768, 768, precision=precision) for precision in ("fp16", "fp32", "autocast")),
    Shape(DINO, 768, 3072, precision="autocast", dropout=0.0),
)
REDUCED_SHAPES: tuple[Shape, ...] = (
    *(Shape(REDUCED, k, n, precision="fp32") for k, n in ((768, 768), (768, 3072), (3072, 768))),
    Shape(REDUCED, 768, 768, precision="fp32", members=3),
    Shape(REDUCED, 768, 768, precision="fp32", dropout=0.0),
    Shape(REDUCED, 768, 768, precision="autocast"),
)


class Linear(NamedTuple):
    """One member's tensors, with lora_linear's names."""

    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor


def case(shape: Shape) -> Case:
    """The Case of a shape."""
    dtype, autocast = PRECISIONS[shape.precision]
    return Case(
        name=shape.name,
        params=asdict(shape),
        dtype=autocast or dtype,
        autocast=autocast is not None,
        make_inputs=lambda device: Inputs(shape, device),
        arms={
            FROZEN: _frozen,
            PEFT: lambda inputs: _arm(inputs, inputs.peft()),
            COMPILED: _compiled,
            ADDMM: lambda inputs: _arm(inputs, [AddmmLora(*linear, 1.0, shape.dropout) for linear in inputs.linears]),
            FASTADAPT: _fastadapt,
        },
        verify=_verify,
        work={"forward": forward_work(shape), "forward+backward": total_work(shape)},
    )


def forward_work(shape: Shape) -> Work:
    """2 M N K for the frozen product and 2 M r (K + N) for the update; x, W, A, B and y once each."""
    m, k, n, r, g = shape.rows, shape.k, shape.n, shape.r, shape.members
    size, weight_size = sizes(shape.precision)
    flops = g * (2 * m * n * k + 2 * m * r * (k + n))
    return Work(flops, size * m * k + g * (size * m * n + weight_size * (n * k + r * (k + n))))


def total_work(shape: Shape) -> Work:
    """The forward, and 2 M N K for dX and 4 M r (K + N) for dS, dS A, dA and dB; each tensor once in each direction."""
    m, k, n, r, g = shape.rows, shape.k, shape.n, shape.r, shape.members
    size, weight_size = sizes(shape.precision)
    flops = g * (2 * m * n * k + 4 * m * r * (k + n))
    traffic = 2 * size * m * k + g * (size * m * n + weight_size * (n * k + 2 * r * (k + n)))
    return forward_work(shape) + Work(flops, traffic)


class Inputs:
    """What the arms share: inputs, weights, gradients, and the results of the plain formula."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        dtype, autocast = PRECISIONS[shape.precision]
        self.shape, self.device, self.dtype, self.autocast = shape, device, dtype, autocast
        torch.manual_seed(SEED)
        count = 1 if device.type == "meta" else ROTATION
        # activations have autocast's dtype where there is one, as between the layers of a model
        self.xs = [self._random(shape.rows, shape.k, dtype=autocast or dtype).requires_grad_() for _ in range(count)]
        self.linears = [self._linear() for _ in range(shape.members)]
        self.grads = [self._random(shape.rows, shape.n, dtype=autocast or dtype) for _ in range(shape.members)]
        self.exact = cache(lambda dropout: self._formula(dropout, torch.float64))
        self.eager = cache(lambda dropout: self._formula(dropout, dtype))

    def _random(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, device=self.device).mul_(scale).to(dtype or self.dtype)

    def _linear(self) -> Linear:
        shape = self.shape
        return Linear(
            self._random(shape.n, shape.k, scale=shape.k**-0.5),
            self._random(shape.n),
            nn.Parameter(self._random(shape.r, shape.k, scale=shape.k**-0.5)),
            nn.Parameter(self._random(shape.n, shape.r, scale=shape.r**-0.5)),
        )

    @property
    def factors(self) -> list[Tensor]:
        """A and B of every member."""
        return [factor for linear in self.linears for factor in (linear.lora_a, linear.lora_b)]

    def peft(self) -> list[nn.Module]:
        """PEFT's LoRA layers around these very tensors."""
        return [_peft_layer(linear, self.shape) for linear in self.linears]

    def _formula(self, dropout: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """The equation in plain torch, with fastadapt's masks (one seed, a member's index each) if dropout is on."""
        exact = dtype == torch.float64
        x = (self.xs[0].double() if exact else self.xs[0]).detach().requires_grad_()
        linears = [
            Linear(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in linear)) for linear in self.linears
        ]
        torch.manual_seed(SEED)
        seed = philox.draw_seed(self.device) if dropout else None
        with autocasting(self.device, None if exact else self.autocast):
            ys = [
                F.linear(x, weight, bias) + F.linear(F.linear(self._dropped(x, seed, g), lora_a), lora_b)
                for g, (weight, bias, lora_a, lora_b) in enumerate(linears)
            ]
        leaves = [x, *(factor for linear in linears for factor in (linear.lora_a, linear.lora_b))]
        return _named(ys, torch.autograd.grad(ys, leaves, [grad.to(ys[0].dtype) for grad in self.grads]))

    def _dropped(self, x: Tensor, seed: Tensor | None, member: int) -> Tensor:
        p = self.shape.dropout
        return x if seed is None else x * philox.keep_mask(seed, *x.shape, p, member) * philox.inv_keep(p)


def _peft_layer(linear: Linear, shape: Shape) -> nn.Module:
    base = nn.Linear(shape.k, shape.n, device="meta")
    base.weight, base.bias = nn.Parameter(linear.weight, False), nn.Parameter(linear.bias, False)
    config = LoraConfig(r=shape.r, lora_alpha=shape.r, lora_dropout=shape.dropout, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0].train()
    # every arm's gradients reach the same leaves
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = linear.lora_a, linear.lora_b
    return layer


def _fastadapt(inputs: Inputs) -> Arm:
    """fastadapt's own call: one for a linear, one for a whole group."""
    weights, biases, lora_as, lora_bs = zip(*inputs.linears)
    options = {"scales": [1.0] * len(weights), "dropout_p": inputs.shape.dropout}

    def group(x: Tensor, training: bool) -> tuple[Tensor, ...]:
        return fastadapt.lora_linear_group(x, weights, biases, lora_as, lora_bs, training=training, **options)

    return _arm_of(inputs, group)


def _arm(inputs: Inputs, layers: Sequence[nn.Module]) -> Arm:
    """Layers called one after another, as a model calls them."""

    def call(x: Tensor, training: bool) -> list[Tensor]:
        return [layer.train(training)(x) for layer in layers]

    return _arm_of(inputs, call)


def _compiled(inputs: Inputs) -> Arm:
    layers = inputs.peft()
    compile_in_place(layers)
    return _arm(inputs, layers)


def _frozen(inputs: Inputs) -> Arm:
    """The linears without LoRA, as one product: the least any arm must do."""
    weight = torch.cat([linear.weight for linear in inputs.linears])
    bias = torch.cat([linear.bias for linear in inputs.linears])
    grad = torch.cat(inputs.grads, dim=-1)

    def forward(i: int) -> tuple[Tensor, Tensor]:
        with autocasting(inputs.device, inputs.autocast):
            return inputs.xs[i], F.linear(inputs.xs[i], weight, bias)

    return Arm(
        forward=forward,
        backward=lambda result: torch.autograd.grad(result[1], result[0], grad),
        outputs=lambda dropout: {},
        constants=[weight, bias],
    )


def _arm_of(inputs: Inputs, call: Callable[[Tensor, bool], Sequence[Tensor]]) -> Arm:
    def forward(i: int, training: bool = True) -> tuple[Tensor, Sequence[Tensor]]:
        with autocasting(inputs.device, inputs.autocast):
            return inputs.xs[i], call(inputs.xs[i], training)

    def backward(result: tuple[Tensor, Sequence[Tensor]]) -> tuple[Tensor, ...]:
        x, ys = result
        return torch.autograd.grad(ys, [x, *inputs.factors], inputs.grads)

    def outputs(dropout: bool) -> dict[str, Tensor]:
        torch.manual_seed(SEED)
        with poisoned():
            result = forward(0, dropout)
            return _named(result[1], backward(result))

    constants = [tensor for linear in inputs.linears for tensor in linear]
    return Arm(forward=forward, backward=backward, outputs=outputs, constants=constants)


def _named(ys: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    names = ["dx", *(f"d{factor}[{g}]" for g in range(len(ys)) for factor in ("lora_a", "lora_b"))]
    return {f"y[{g}]": y.detach() for g, y in enumerate(ys)} | dict(zip(names, grads))


def _verify(name: str, arm: Arm, inputs: Inputs) -> dict[str, Verdict]:
    """Against the formula in float64: every arm without dropout, and those that draw fastadapt's masks with it."""
    if name == FROZEN:
        return {}
    p = inputs.shape.dropout
    settings = [False, True] if p and name == FASTADAPT else [False]
    dtype = inputs.autocast or inputs.dtype
    return {
        f"dropout {p if on else 0:g}": judge(arm.outputs(on), inputs.eager(on), inputs.exact(on), dtype)
        for on in settings
    }
