"""The calls of lora_linear that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadapt.core import philox
from fastadapt.kernels.lora_linear.op import lora_linear_group
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

SEED = 0

BACKENDS = ("native", "triton")


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
        """Whether the rows of x, y and the weights are known to start at a multiple of 16 bytes."""
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
    Case(VIT, 768, ((768, 16),)),
    Case(VIT, 768, ((3072, 16),)),
    Case(VIT, 3072, ((768, 16),)),
    Case(VIT, 768, ((768, 16),) * 3),
    Case(TEXT, 768, ((768, 8),)),
    Case(PROMPT, 768, ((768, 16),), dropout_p=0.0),
    Case(PROMPT, 768, ((768, 16),), dropout_p=0.0, precision="fp16"),
    Case(VIT, 768, ((768, 16),), precision="tf32"),
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
    x, *flat = tensors.values()
    torch.manual_seed(SEED)
    with computing(case.precision, x):
        members = (flat[i::4] for i in range(4))
        scales, p = [1.0] * len(case.members), case.dropout_p
        ys = lora_linear_group(x, *members, scales=scales, dropout_p=p, backend=backend)
        return outputs_and_gradients({f"y[{g}]": y for g, y in enumerate(ys)}, tensors)


def masks(device: torch.device, backend: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The masks of two members as y, dx and dA show them, beside core.philox's; of a fused and of a split rank."""
    found = {}
    for width in (40, 104):
        ones = torch.ones(width, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        eye = torch.eye(width, dtype=torch.bfloat16, device=device)
        downs = [eye.clone().requires_grad_() for _ in range(2)]
        torch.manual_seed(SEED)
        # y_g = m_g(1) / (1 - p): all that is not zero was kept, here and in the gradients
        ys = lora_linear_group(
            ones, [0 * eye] * 2, [None] * 2, downs, [eye] * 2, scales=[1.0] * 2, dropout_p=0.3, backend=backend
        )
        torch.manual_seed(SEED)
        seed = philox.draw_seed(device)
        for g, y in enumerate(ys):
            (dx,) = torch.autograd.grad(y, ones, ones, retain_graph=True)
            (da,) = torch.autograd.grad(y, downs[g], eye, retain_graph=True)
            mask = philox.keep_mask(seed, width, width, 0.3, g)
            seen = {"y": y, "dx": dx, "dA": da}
            found |= {f"{name}[{g}], width {width}": (tensor != 0, mask) for name, tensor in seen.items()}
    return found


_PRODUCT = Budget(tensor_core=True, min_load_bytes=16, min_store_bytes=16, min_wide_load_share=0.75)
BUDGETS = {
    "forward_kernel": _PRODUCT,
    "grad_input_kernel": _PRODUCT,
    "project_kernel": Budget(min_load_bytes=16, min_wide_load_share=0.8),
    "factor_grads_kernel": Budget(min_load_bytes=16, min_wide_load_share=0.9),
    "sum_kernel": Budget(min_load_bytes=16, min_store_bytes=16, min_wide_load_share=1.0),
    "merge_kernel": Budget(min_load_bytes=16, min_store_bytes=16, min_wide_load_share=1.0),
}


def budget(case: Case, kernel: str) -> Budget:
    """BUDGETS, less what a case cannot have: see the comments."""
    bound = BUDGETS[kernel]
    if not case.aligned:  # rows that start anywhere are loaded an element at a time
        bound = replace(bound, min_load_bytes=0, min_store_bytes=0, min_wide_load_share=0.0)
    if case.precision == "fp32":  # exact float32 has no tensor-core instruction
        bound = replace(bound, tensor_core=False)
    if case.precision == "tf32":  # wgmma wants these contiguous along the sum: W is transposed 4 bytes at a time
        bound = replace(bound, min_wide_load_share=0.45)
    return bound
