"""The calls of light_interaction that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadapt.kernels.light_interaction.op import light_interaction
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("triton",)


@dataclass(frozen=True)
class Case:
    """x (batch, tokens, width), y (batch, words, width); masked: whether samples have fewer words; precision: of PRECISIONS."""

    batch: int
    tokens: int
    words: int
    width: int
    num_heads: int
    masked: bool = False
    precision: str = "bf16"

    @property
    def name(self) -> str:
        masked = " masked" if self.masked else ""
        return f"{self.batch}x{self.tokens}x{self.words}, {self.num_heads} heads of {self.width}{masked} {self.precision}"


SHIPPED = (
    Case(32, 676, 17, 64, 8),  # ETRIS at 416 pixels, RefCOCO's 17 words and RefCOCOg's 22
    Case(32, 676, 17, 64, 8, precision="fp16"),
    Case(32, 676, 17, 64, 8, precision="autocast"),
    Case(32, 676, 22, 64, 8, masked=True),
    Case(32, 676, 17, 128, 8),
    Case(32, 676, 17, 64, 8, precision="fp32"),
    Case(32, 676, 17, 64, 8, precision="tf32"),
)

EDGES = (
    Case(2, 70, 5, 16, 4, masked=True, precision="fp32"),
    Case(2, 33, 17, 64, 8),
    Case(1, 1, 1, 32, 1, precision="fp16"),
    Case(3, 50, 32, 32, 8, masked=True, precision="autocast"),
    Case(2, 20, 16, 128, 8, precision="fp16"),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x, y, the eight weights and biases by role and direction, and the mask where there is one."""
    dtype = PRECISIONS[case.precision][0]
    width = case.width

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    tensors = {"x": random(case.batch, case.tokens, width), "y": random(case.batch, case.words, width)}
    roles = {"in_weight": (3 * width, width), "in_bias": (3 * width,), "out_weight": (width, width), "out_bias": (width,)}
    for role, shape in roles.items():
        for direction in (0, 1):
            tensors[f"{role}[{direction}]"] = random(*shape, scale=width**-0.5 if len(shape) == 2 else 1.0)
    if case.masked:
        lengths = torch.arange(case.batch, device=device) % (case.words + 1)  # sample 0 has no word
        tensors["mask"] = torch.arange(case.words, device=device) >= lengths[:, None]
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """x', y' and the gradients of all floating-point tensors."""
    x, y, *flat = (tensor for name, tensor in tensors.items() if name != "mask")
    mask = tensors.get("mask")
    roles = [flat[i : i + 2] for i in range(0, len(flat), 2)]
    torch.manual_seed(0)
    with computing(case.precision, x):
        mask = None if mask is None else mask.bool()  # a float64 copy of the inputs has a float64 mask
        outputs = light_interaction(x, y, *roles, num_heads=case.num_heads, y_padding_mask=mask, backend=backend)
        return outputs_and_gradients(dict(zip(("x'", "y'"), outputs)), tensors)


_PRODUCTS = Budget(tensor_core=True, few_rows=True, min_load_bytes=16, min_store_bytes=16)
BUDGETS = {
    "forward_kernel": replace(_PRODUCTS, min_wide_load_share=0.7),
    "words_kernel": replace(_PRODUCTS, min_wide_load_share=0.25),  # a log-sum-exp for every column, but of few words
    "over_image_backward_kernel": replace(_PRODUCTS, min_wide_load_share=0.7),
    "over_words_backward_kernel": replace(_PRODUCTS, min_wide_load_share=0.7),
    "words_backward_kernel": replace(_PRODUCTS, min_wide_load_share=0.9),
    "weight_grads_kernel": replace(_PRODUCTS, min_wide_load_share=0.9),
    "sum_kernel": Budget(min_load_bytes=16, min_wide_load_share=0.9),
}


def budget(case: Case, kernel: str) -> Budget:
    """BUDGETS, less what a case cannot have: see the comments."""
    bound = BUDGETS[kernel]
    if case.width < 64:  # rows so short that a program's threads share them out in smaller pieces
        bound = replace(bound, min_load_bytes=4, min_store_bytes=0, min_wide_load_share=0.0)
    if case.precision == "tf32" and kernel == "weight_grads_kernel":  # wgmma wants rows side by side, which lie `width` apart
        bound = replace(bound, min_load_bytes=0, min_wide_load_share=0.0)
    if case.precision == "fp32" and kernel.startswith("over_"):
        bound = replace(bound, max_spills=16, max_local=40)  # every operand is there twice, as two TF32 numbers
    return bound
