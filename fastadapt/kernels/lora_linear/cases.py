"""The calls of lora_linear that are proved, and the budgets of the kernels that they compile to (fastadapt.prove.cases)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapt.core import philox
from fastadapt.kernels.lora_linear.op import lora_linear, lora_linear_group
from fastadapt.prove.cases import outputs_and_gradients
from fastadapt.prove.report import Budget

SEED = 0

# dtype of the tensors, autocast's, and torch's float32_matmul_precision
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None, str]] = {
    "bf16": (torch.bfloat16, None, "highest"),
    "fp16": (torch.float16, None, "highest"),
    "fp32": (torch.float32, None, "highest"),
    "tf32": (torch.float32, None, "high"),
    "autocast": (torch.float32, torch.bfloat16, "highest"),
}


@dataclass(frozen=True)
class Case:
    """x (rows, in_features) through linears with (out_features, rank) each; precision: a key of PRECISIONS."""

    rows: int
    in_features: int
    members: tuple[tuple[int, int], ...]
    dropout_p: float = 0.1
    precision: str = "bf16"

    @property
    def name(self) -> str:
        outs, ranks = ("+".join(str(size) for size in sizes) for sizes in zip(*self.members))
        return f"{self.rows}x{self.in_features}->{outs} r{ranks} p{self.dropout_p:g} {self.precision}"

    @property
    def aligned(self) -> bool:
        """Whether every row of every operand but the factors' starts at a multiple of 16 bytes."""
        return all(size % 16 == 0 for size in (self.in_features, *(width for width, _ in self.members)))


# tokens of 32 images at 224 and at 518 pixels, of 32 texts, and of 32 short prompts
VIT, DINO, TEXT, PROMPT = 32 * 197, 32 * 1370, 32 * 77, 32 * 20

SHIPPED = (
    Case(DINO, 768, ((768, 16),)),
    Case(DINO, 768, ((768, 16),), dropout_p=0.0),
    Case(DINO, 768, ((3072, 16),)),
    Case(DINO, 3072, ((768, 16),)),
    Case(DINO, 1024, ((1024, 16),)),
    Case(DINO, 1024, ((4096, 16),), dropout_p=0.0),
    Case(DINO, 768, ((768, 16),) * 3),
    Case(DINO, 768, ((768, 16),) * 3, dropout_p=0.0),
    Case(DINO, 768, ((768, 64),)),
    Case(DINO, 768, ((768, 64),), dropout_p=0.0),
    Case(VIT, 768, ((768, 16),)),
    Case(VIT, 768, ((768, 8),)),
    Case(VIT, 768, ((3072, 16),)),
    Case(VIT, 3072, ((768, 16),)),
    Case(VIT, 768, ((768, 16),) * 3),
    Case(TEXT, 768, ((768, 8),), dropout_p=0.0),
    Case(PROMPT, 768, ((768, 16),)),
    Case(VIT, 768, ((768, 16),), precision="fp16"),
    Case(VIT, 768, ((768, 16),), precision="tf32"),
    Case(VIT, 768, ((768, 16),), dropout_p=0.0, precision="tf32"),
    Case(VIT, 768, ((768, 16),), precision="fp32"),
    Case(VIT, 768, ((768, 16),), precision="autocast"),
    Case(VIT, 768, ((768, 16),), dropout_p=0.0, precision="autocast"),
)

EDGES = (
    Case(1, 40, ((33, 1),), precision="fp32"),
    Case(70, 100, ((70, 3),), precision="bf16"),
    Case(70, 100, ((70, 17),), dropout_p=0.0, precision="tf32"),
    Case(130, 72, ((136, 16),), precision="bf16"),
    Case(33, 64, ((64, 80),), precision="bf16"),
    Case(50, 64, ((40, 8), (96, 16), (72, 5)), precision="bf16"),
    Case(50, 64, ((40, 8), (96, 80)), dropout_p=0.0, precision="fp16"),
    Case(65, 72, ((100, 17),), dropout_p=0.0, precision="autocast"),
    Case(65, 72, ((100, 17),), precision="autocast"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x, then weight, bias, lora_a and lora_b of each member; the weights and biases are frozen."""
    dtype = PRECISIONS[case.precision][0]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    tensors = {"x": random(case.rows, case.in_features).requires_grad_()}
    for g, (width, rank) in enumerate(case.members):
        tensors[f"weight[{g}]"] = random(width, case.in_features, scale=case.in_features**-0.5)
        tensors[f"bias[{g}]"] = random(width)
        tensors[f"lora_a[{g}]"] = random(rank, case.in_features, scale=case.in_features**-0.5).requires_grad_()
        tensors[f"lora_b[{g}]"] = random(width, rank, scale=rank**-0.5).requires_grad_()
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs y[g] and the gradients of x, lora_a[g] and lora_b[g]."""
    _, autocast, precision = PRECISIONS[case.precision]
    x, *flat = tensors.values()
    device = "cuda" if x.is_cuda else "cpu"  # whose autocast meta tensors follow (core.backend)
    torch.manual_seed(SEED)
    with float32_matmul_precision(precision):
        with torch.autocast(device, autocast) if autocast else nullcontext():
            members = (flat[i::4] for i in range(4))
            scales, p = [1.0] * len(case.members), case.dropout_p
            ys = lora_linear_group(x, *members, scales=scales, dropout_p=p, backend=backend)
        return outputs_and_gradients({f"y[{g}]": y for g, y in enumerate(ys)}, tensors)


@contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
