"""The calls of local_dwconv that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadapt.kernels.local_dwconv.op import local_dwconv
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("triton",)


@dataclass(frozen=True)
class Case:
    """x (batch, prefix + grid, channels) by a kernel; precision: of PRECISIONS."""

    batch: int
    grid: tuple[int, int]
    channels: int
    kernel: tuple[int, int] = (3, 3)
    dilation: int = 1
    prefix: int = 1
    precision: str = "bf16"

    @property
    def name(self) -> str:
        (height, width), (kh, kw) = self.grid, self.kernel
        extras = [f"dilation {self.dilation}"] if self.dilation > 1 else []
        tokens = f"{self.batch}x({self.prefix}+{height}x{width})x{self.channels}"
        return " ".join([tokens, f"{kh}x{kw}", *extras, self.precision])


VIT, DINO = (14, 14), (37, 37)  # grids of patches at 224 and at 518 pixels

SHIPPED = (
    Case(32, DINO, 768),
    Case(32, DINO, 64),  # the hidden of an adapter
    Case(32, DINO, 128),
    Case(32, DINO, 384),
    Case(32, DINO, 768, (5, 5)),
    Case(32, DINO, 768, (7, 7)),
    Case(32, VIT, 768),
    Case(32, VIT, 768, precision="fp16"),
    Case(32, VIT, 64, (5, 5), precision="fp16"),
    Case(32, DINO, 768, precision="fp32"),
    Case(32, VIT, 64, precision="fp32"),
    Case(32, VIT, 64, precision="autocast"),
    Case(32, DINO, 768, dilation=2),
    Case(32, DINO, 768, prefix=0),
    Case(32, DINO, 768, prefix=5),
    Case(32, (5, 9), 768),
)

EDGES = (
    Case(2, (5, 9), 24, precision="fp32"),
    Case(1, (1, 1), 1, (3, 5), dilation=2, precision="fp32"),
    Case(3, (7, 4), 40, (5, 3), dilation=3, prefix=5),
    Case(2, (9, 2), 33, (7, 7), prefix=0, precision="fp16"),
    Case(2, (3, 10), 64, (3, 7), precision="autocast"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x, weight and bias."""
    dtype = PRECISIONS[case.precision][0]
    tokens = case.prefix + case.grid[0] * case.grid[1]
    shapes = {"x": (case.batch, tokens, case.channels), "weight": (case.channels, *case.kernel), "bias": (case.channels,)}
    return {name: torch.randn(shape, device=device).to(dtype).requires_grad_() for name, shape in shapes.items()}


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """y and the gradients of x, weight and bias."""
    torch.manual_seed(0)
    options = {"grid": case.grid, "prefix_tokens": case.prefix, "dilation": case.dilation, "backend": backend}
    with computing(case.precision, tensors["x"]):
        return outputs_and_gradients({"y": local_dwconv(**tensors, **options)}, tensors)


BUDGETS = {
    "conv_kernel": Budget(min_blocks_per_sm=2, min_load_bytes=16, min_store_bytes=16, min_wide_load_share=1.0),
    "weight_grad_kernel": Budget(min_blocks_per_sm=2, min_load_bytes=16, min_wide_load_share=1.0),
    "sum_kernel": Budget(min_load_bytes=16, min_wide_load_share=1.0),
}


def budget(case: Case, kernel: str) -> Budget:
    """BUDGETS: every case has rows of whole 16 bytes."""
    return BUDGETS[kernel]
