"""The calls of local_conv_adapter that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadapt.kernels.local_conv_adapter.op import local_conv_adapter
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("triton",)
ADAPTER = ("x", "down_weight", "down_bias", "weight", "conv_bias", "up_weight", "up_bias")


@dataclass(frozen=True)
class Case:
    """x (batch, prefix + grid, width) through an adapter of h hidden.

    scale: a number, or "shared" or "rows" for a tensor that trains; residual: with one, of x's dtype; precision: of PRECISIONS.
    """

    batch: int
    grid: tuple[int, int]
    width: int
    h: int
    kernel: tuple[int, int] = (3, 3)
    dilation: int = 1
    prefix: int = 1
    activation: str = "gelu"
    scale: float | str = 1.0
    residual: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        (height, width), (kh, kw) = self.grid, self.kernel
        parts = {f"dilation {self.dilation}": self.dilation > 1, f"scale {self.scale}": self.scale != 1.0}
        extras = [part for part, there in (parts | {"residual": self.residual}).items() if there]
        tokens = f"{self.batch}x({self.prefix}+{height}x{width})x{self.width}->{self.h}"
        return " ".join([tokens, f"{kh}x{kw}", self.activation, *extras, self.precision])

    @property
    def aligned(self) -> bool:
        """Whether the rows of every matrix are known to start at a multiple of 16 bytes."""
        return self.width % 16 == self.h % 16 == 0


VIT, DINO = (14, 14), (37, 37)  # grids of patches at 224 and at 518 pixels

SHIPPED = (
    Case(32, DINO, 768, 64, scale=0.1, residual=True),
    Case(32, DINO, 768, 128, (5, 5), scale="shared", precision="fp16"),
    Case(32, DINO, 1024, 256, (7, 7), residual=True),  # the widest hidden and the most taps
    Case(32, VIT, 768, 64, scale="rows", residual=True, precision="autocast"),
)

EDGES = (
    Case(2, (5, 9), 40, 17, scale="rows", residual=True, precision="tf32"),
    Case(3, (7, 4), 48, 16, (5, 3), dilation=2, prefix=5, activation="quick_gelu", precision="autocast"),
    Case(2, (9, 2), 33, 9, (7, 7), prefix=0, activation="identity", scale="shared", residual=True),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x, the adapter's parameters, and a scale and a residual where the case has one."""
    dtype = PRECISIONS[case.precision][0]
    tokens = case.batch, case.prefix + case.grid[0] * case.grid[1]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    tensors = {
        "x": random(*tokens, case.width),
        "down_weight": random(case.h, case.width, scale=case.width**-0.5),
        "down_bias": random(case.h),
        "weight": random(case.h, *case.kernel, scale=(case.kernel[0] * case.kernel[1]) ** -0.5),
        "conv_bias": random(case.h),
        "up_weight": random(case.width, case.h, scale=case.h**-0.5),
        "up_bias": random(case.width),
    }
    if isinstance(case.scale, str):
        tensors["scale"] = random(*(() if case.scale == "shared" else tokens))
    if case.residual:
        tensors["residual"] = random(*tokens, case.width)
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """y and the gradients of the tensors that require one."""
    options = {"scale": case.scale} | {name: tensor for name, tensor in tensors.items() if name not in ADAPTER}
    torch.manual_seed(0)
    with computing(case.precision, tensors["x"]):
        # autocast leaves a residual alone, which has the dtype of what it is added to
        if case.residual and tensors["x"].dtype is not torch.float64:
            options["residual"] = options["residual"].to(PRECISIONS[case.precision][1] or tensors["x"].dtype)
        y = local_conv_adapter(
            *(tensors[name] for name in ADAPTER), **options, grid=case.grid, prefix_tokens=case.prefix, dilation=case.dilation,
            activation=case.activation, backend=backend,
        )  # fmt: skip
        return outputs_and_gradients({"y": y}, tensors)


def budget(case: Case, kernel: str) -> Budget:
    """Whole pieces of 16 bytes where rows start at their multiples; biases and taps are read in smaller ones."""
    if kernel == "prepare_kernel":
        return Budget()
    few_rows = not case.aligned or case.precision == "tf32" or case.h > 128
    if not case.aligned:
        return Budget(tensor_core=True, few_rows=few_rows)
    return Budget(tensor_core=True, min_load_bytes=16, min_store_bytes=8, min_wide_load_share=0.5, few_rows=few_rows)
