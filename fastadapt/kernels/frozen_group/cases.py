"""The calls of frozen_group that are proved, and the budgets of its own kernels (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadapt.kernels.frozen_group.op import frozen_group
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("triton",)


@dataclass(frozen=True)
class Case:
    """x (rows, width), a prologue, and one linear of `rank` (0: frozen, None: no linear at all).

    branch: "plain", "dropped" or "scaled", or None; normed: whether n is a result; precision: a key of PRECISIONS.
    """

    rows: int
    width: int
    prologue: str
    branch: str | None = None
    normed: bool = False
    rank: int | None = 0
    out: int = 16
    precision: str = "bf16"

    @property
    def name(self) -> str:
        branch = [f"{self.branch} branch"] if self.branch else []
        members = [] if self.rank is None else [f"-> {self.out} r {self.rank}"]
        return " ".join([f"{self.rows}x{self.width}", self.prologue, *branch, *["n"] * self.normed, *members, self.precision])

    @property
    def aligned(self) -> bool:
        """Whether rows are known to start at a multiple of 16 bytes."""
        return self.width % 16 == 0


VIT, TEXT, DETR = 32 * 197, 32 * 40, 8 * 400

SHIPPED = (
    Case(VIT, 768, "layer_norm"),
    Case(VIT, 768, "layer_norm", rank=16),
    Case(VIT, 768, "layer_norm", "plain", rank=16),
    Case(VIT, 768, "layer_norm", "scaled", normed=True, rank=16),
    Case(VIT, 1024, "layer_norm", "plain", rank=16),
    Case(VIT, 768, "layer_norm", "plain", precision="fp16"),
    Case(VIT, 768, "layer_norm", "plain", precision="fp32"),
    Case(VIT, 768, "layer_norm", "plain", rank=16, precision="autocast"),
    Case(VIT, 768, "identity", "scaled", rank=None),
    Case(VIT, 768, "identity", "dropped", rank=None),
    Case(TEXT, 768, "layer_norm", "dropped", normed=True, rank=None),
    Case(TEXT, 512, "layer_norm", "dropped", normed=True, rank=16),
    Case(DETR, 256, "layer_norm", "dropped", normed=True, rank=16),
    Case(VIT, 3072, "gelu", rank=16),
    Case(VIT, 3072, "quick_gelu", rank=16),
    Case(VIT, 3072, "quick_gelu", precision="fp16"),
    Case(VIT, 3072, "gelu", precision="fp32"),
    Case(VIT, 3072, "gelu_tanh", rank=16),
    Case(DETR, 2048, "relu", rank=16),
)

EDGES = (
    Case(1, 1, "layer_norm", "scaled", normed=True, rank=1, precision="fp32"),
    Case(7, 33, "layer_norm", "dropped", normed=True, rank=3),
    Case(5, 1100, "quick_gelu", rank=2, precision="fp16"),
    Case(3, 40, "gelu_tanh", "plain", normed=True, precision="fp32"),
    Case(9, 72, "relu", "scaled", rank=4),
    Case(6, 100, "identity", "dropped", rank=None),
    Case(4, 48, "layer_norm", "scaled", rank=2, precision="autocast"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x and what else the case has, by frozen_group's names; the linear's tensors are in its sequences' singular."""
    dtype, autocast, _ = PRECISIONS[case.precision]
    trained = torch.float32 if autocast else dtype

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    tensors = {"x": random(case.rows, case.width).requires_grad_()}
    if case.branch:
        tensors["branch"] = random(case.rows, case.width).requires_grad_()
    if case.branch == "scaled":
        tensors["branch_scale"] = random(case.width)
    if case.prologue == "layer_norm":
        tensors |= {"norm_weight": random(case.width), "norm_bias": random(case.width)}
    if case.rank is not None:
        tensors |= {"weight": random(case.out, case.width, scale=case.width**-0.5), "bias": random(case.out)}
    if case.rank:
        tensors["lora_a"] = random(case.rank, case.width, scale=case.width**-0.5).to(trained).requires_grad_()
        tensors["lora_b"] = random(case.out, case.rank).to(trained).requires_grad_()
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """s, n and y, those there are, and the gradients of the tensors that require one."""
    members = {"weights": "weight", "biases": "bias", "lora_as": "lora_a", "lora_bs": "lora_b"}
    given = {} if case.rank is None else {name: [tensors.get(one)] for name, one in members.items()} | {"scales": [0.5]}
    around = {name: tensor for name, tensor in tensors.items() if name not in members.values()}
    dropout = {"branch_dropout_p": 0.1} if case.branch == "dropped" else {}
    torch.manual_seed(0)
    with computing(case.precision, tensors["x"]):
        found = frozen_group(
            **around, **given, **dropout, prologue=case.prologue, return_normed=case.normed, backend=backend
        )
        outputs = {"s": found.total, "n": found.normed} | {"y": y for y in found.outputs}
        return outputs_and_gradients({name: output for name, output in outputs.items() if output is not None}, tensors)


_BUDGET = Budget(min_blocks_per_sm=2, min_load_bytes=16, min_store_bytes=16, min_wide_load_share=0.8)


def budget(case: Case, kernel: str) -> Budget:
    """Rows are moved 16 bytes at a time, and two programs share a multiprocessor where a row leaves room for it; the linears
    have bounds of their own."""
    if kernel not in ("prologue_kernel", "prologue_grad_kernel") or not case.aligned:
        return Budget()
    return replace(_BUDGET, min_blocks_per_sm=1) if case.width > 8192 else _BUDGET
