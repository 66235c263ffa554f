"""The calls of prior_attention that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadapt.kernels.prior_attention.op import prior_attention
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

SEED = 0

BACKENDS = ("triton",)


@dataclass(frozen=True)
class Case:
    """q (batch, queries, num_heads * head_width) over keys; masked: whether samples have fewer; precision: of PRECISIONS."""

    batch: int
    queries: int
    keys: int
    num_heads: int
    head_width: int
    masked: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        masked = " masked" if self.masked else ""
        return f"{self.batch}x{self.queries} over {self.keys}, {self.num_heads}x{self.head_width}{masked} {self.precision}"


SHIPPED = (
    Case(32, 197, 77, 12, 64),  # HiVG's bridge
    Case(32, 197, 77, 12, 64, masked=True),
    Case(32, 1370, 20, 12, 64, masked=True),  # MaPPER's texts, DINOv2 at 518 pixels
    Case(32, 1370, 77, 12, 64, masked=True),
    Case(32, 676, 17, 8, 8),  # ETRIS's light Interactor, ladders of 64 and 128
    Case(32, 676, 17, 8, 16),
    Case(32, 1370, 256, 12, 32),
    Case(32, 197, 77, 12, 64, precision="fp16"),
    Case(32, 197, 20, 12, 64, precision="tf32"),
    Case(32, 676, 17, 8, 8, precision="tf32"),
)

EDGES = (
    Case(2, 9, 5, 2, 8, precision="fp32"),
    Case(1, 1, 1, 1, 8, precision="tf32"),
    Case(2, 70, 16, 2, 8),
    Case(2, 130, 17, 3, 16, masked=True, precision="tf32"),
    Case(3, 65, 77, 2, 64, masked=True),
    Case(1, 300, 20, 2, 32, precision="fp16"),
    Case(1, 33, 256, 1, 32, masked=True, precision="tf32"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """q, k and v."""
    dtype = PRECISIONS[case.precision][0]
    width = case.num_heads * case.head_width
    rows = {"q": case.queries, "k": case.keys, "v": case.keys}
    return {
        name: torch.randn(case.batch, count, width, device=device).to(dtype).requires_grad_()
        for name, count in rows.items()
    }


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The output and the gradients of q, k and v; where keys are masked, sample b has keys - b of them, at least none."""
    q, k, v = tensors.values()
    torch.manual_seed(SEED)
    mask = None
    if case.masked:
        number, sample = torch.arange(case.keys, device=q.device), torch.arange(case.batch, device=q.device)
        mask = number >= (case.keys - sample)[:, None]
    with computing(case.precision, q):
        out = prior_attention(q, k, v, num_heads=case.num_heads, key_padding_mask=mask, backend=backend)
        return outputs_and_gradients({"out": out}, tensors)


# 16 or 32 keys are too few rows for the widest instructions of Hopper and later
_PRODUCT = Budget(tensor_core=True, few_rows=True, min_load_bytes=16, min_store_bytes=16, min_wide_load_share=0.6)
BUDGETS = {
    "forward_kernel": _PRODUCT,
    "backward_kernel": _PRODUCT,
    "sum_kernel": Budget(min_load_bytes=16, min_store_bytes=16, min_wide_load_share=1.0),
}


def budget(case: Case, kernel: str) -> Budget:
    """BUDGETS, less what a case cannot have: see the comments."""
    bound = BUDGETS[kernel]
    if kernel == "sum_kernel":
        return bound
    if case.head_width <= 16 and case.keys > 32:  # more threads than a step has 16 bytes for
        bound = replace(bound, min_load_bytes=8, min_store_bytes=8, min_wide_load_share=0.0)
    if case.precision == "tf32":  # ptxas takes fewer registers than there are, for more blocks, and spills a few values
        bound = replace(bound, max_spills=8, max_local=16)
    return bound
