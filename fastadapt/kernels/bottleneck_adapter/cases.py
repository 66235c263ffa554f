"""The calls of bottleneck_adapter that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadapt.kernels.bottleneck_adapter.op import bottleneck_adapter
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("triton",)
OPTIONAL = ("norm_weight", "norm_bias", "scale", "residual")


@dataclass(frozen=True)
class Case:
    """x (rows, depth) through an adapter of h hidden and `width` outputs.

    norm: with LayerNorm; frozen: x needs no gradient; scale: a number, or "shared" or "rows" for a tensor that trains; residual:
    with one, of x's dtype; precision: a key of PRECISIONS.
    """

    rows: int
    depth: int
    h: int
    width: int
    activation: str = "relu"
    norm: bool = False
    frozen: bool = False
    scale: float | str = 1.0
    residual: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        parts = {"norm": self.norm, "frozen": self.frozen, "residual": self.residual}
        extras = [name for name, there in parts.items() if there]
        if self.scale != 1.0:
            extras.append(f"scale {self.scale}")
        return " ".join([f"{self.rows}x{self.depth}->{self.h}->{self.width}", self.activation, *extras, self.precision])

    @property
    def aligned(self) -> bool:
        """Whether the rows of every matrix are known to start at a multiple of 16 bytes."""
        return all(size % 16 == 0 for size in (self.depth, self.h, self.width))


VIT, DINO = 32 * 197, 32 * 1370  # tokens of 32 images at 224 and at 518 pixels
MAPPER_TEXT = 32 * 20
M2IST_VISION, M2IST_TEXT = 64 * 400, 64 * 20

SHIPPED = (
    Case(DINO, 768, 64, 768, residual=True, scale=0.1),
    Case(DINO, 768, 64, 768, "gelu", norm=True),
    Case(DINO, 768, 128, 768, "quick_gelu", residual=True),
    Case(DINO, 1024, 256, 1024),
    Case(VIT, 768, 64, 768, residual=True, scale=0.1),
    Case(VIT, 768, 64, 768, norm=True, residual=True, scale="shared"),
    Case(MAPPER_TEXT, 768, 32, 768, norm=True, scale="rows", residual=True),
    Case(MAPPER_TEXT, 768, 32, 768, norm=True, scale="rows", frozen=True, precision="fp16"),
    Case(M2IST_VISION, 256, 128, 256, norm=True, frozen=True, scale=0.1),
    Case(M2IST_VISION, 256, 128, 256, frozen=True),
    Case(M2IST_TEXT, 768, 128, 768, norm=True, frozen=True, scale=0.1),
    Case(VIT, 768, 64, 768, precision="fp16"),
    Case(VIT, 768, 64, 768, norm=True, precision="tf32"),
    Case(M2IST_VISION, 256, 128, 256, norm=True, frozen=True, scale=0.1, precision="tf32"),
    Case(MAPPER_TEXT, 768, 32, 768, norm=True, scale="rows", precision="fp32"),
    Case(VIT, 768, 64, 768, norm=True, precision="autocast"),
)

EDGES = (
    Case(1, 24, 1, 33, precision="fp32"),
    Case(70, 72, 17, 40, "gelu", norm=True, scale="rows", residual=True),
    Case(70, 72, 17, 40, "quick_gelu", frozen=True, norm=True, scale="shared", precision="fp16"),
    Case(130, 100, 33, 64, "identity", residual=True, scale=0.1),
    Case(50, 64, 16, 64, scale="shared", precision="tf32"),
    Case(65, 72, 20, 72, norm=True, precision="autocast"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x, the adapter's parameters, and of OPTIONAL those that the case has."""
    dtype = PRECISIONS[case.precision][0]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    tensors = {
        "x": random(case.rows, case.depth).requires_grad_(not case.frozen),
        "down_weight": random(case.h, case.depth, scale=case.depth**-0.5),
        "down_bias": random(case.h),
        "up_weight": random(case.width, case.h, scale=case.h**-0.5),
        "up_bias": random(case.width),
    }
    if case.norm:
        tensors |= {"norm_weight": random(case.depth), "norm_bias": random(case.depth)}
    if isinstance(case.scale, str):
        tensors["scale"] = random(*(() if case.scale == "shared" else (case.rows,)))
    if case.residual:
        tensors["residual"] = random(case.rows, case.width)
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """y and the gradients of the tensors that require one."""
    adapter = [tensors[name] for name in ("x", "down_weight", "down_bias", "up_weight", "up_bias")]
    optional = {name: tensors[name] for name in OPTIONAL if name in tensors}
    if not isinstance(case.scale, str):
        optional["scale"] = case.scale
    torch.manual_seed(0)
    with computing(case.precision, tensors["x"]):
        # autocast leaves a residual alone, which has the dtype of what it is added to
        if "residual" in optional and optional["residual"].dtype is not torch.float64:
            optional["residual"] = optional["residual"].to(PRECISIONS[case.precision][1] or tensors["x"].dtype)
        y = bottleneck_adapter(*adapter, **optional, activation=case.activation, backend=backend)
        return outputs_and_gradients({"y": y}, tensors)


_BUDGET = Budget(tensor_core=True, min_load_bytes=16, min_store_bytes=8, min_wide_load_share=0.75)
FEW_ROWS = 64 * 64  # then a program takes 16 rows, so that there are enough programs


def budget(case: Case, kernel: str) -> Budget:
    """What every kernel can have in a plain case, less what this one cannot: see the comments."""
    bound = _BUDGET
    if not case.aligned:  # rows that start anywhere are loaded an element at a time
        bound = replace(bound, min_load_bytes=0, min_store_bytes=0, min_wide_load_share=0.0, few_rows=True)
    wide = case.h > 128 and kernel == "hidden_grad_kernel"
    if case.rows < FEW_ROWS or case.precision == "tf32" or wide:
        bound = replace(bound, few_rows=True)
    if case.precision == "tf32" and kernel == "weight_grad_kernel":  # wgmma wants both operands contiguous along the sum
        bound = replace(bound, min_wide_load_share=0.5)
    if case.precision == "fp32":  # exact float32 has no tensor-core instruction
        bound = replace(bound, tensor_core=False)
    return bound
