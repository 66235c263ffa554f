"""The calls of side_fusion that are proved, and the budgets of the kernels they compile to (see prove/cases.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadapt.kernels.side_fusion.op import SideTap, side_fusion
from fastadapt.prove.cases import PRECISIONS, computing, outputs_and_gradients
from fastadapt.prove.report import Budget

BACKENDS = ("native", "triton")


@dataclass(frozen=True)
class Kind:
    """An adapter of N columns, of which S makes `shared`, all of them if that is None, and U the others.

    linear: without an up-projection, and with h = N; norm, out_norm: with LayerNorm, with LN_out.
    """

    shared: int | None = 0
    linear: bool = False
    norm: bool = False
    out_norm: bool = False
    activation: str = "relu"
    scale: float = 1.0


@dataclass(frozen=True)
class Case:
    """Adapters of h hidden on as many taps (rows, depth), whose results of `width` columns are added to two bases.

    precision: a key of PRECISIONS.
    """

    label: str
    rows: int
    depth: int
    hidden: int
    width: int
    kinds: tuple[Kind, ...]
    precision: str = "bf16"

    @property
    def name(self) -> str:
        sizes = f"{self.rows}x{self.depth}->{self.hidden}->{self.width}"
        return f"{self.label} {len(self.kinds)} x {sizes} {self.precision}"

    @property
    def aligned(self) -> bool:
        """Whether the rows of every matrix are known to start at a multiple of 16 bytes."""
        return all(size % 16 == 0 for size in (self.depth, self.hidden, self.width))


# M2IST's interaction and intermediate experts of a layer, in the vision and in the text tower
VISION = Kind(shared=None), Kind(norm=True, scale=0.1)
TEXT = Kind(shared=256, out_norm=True), Kind(norm=True, scale=0.1, out_norm=True)
LINEAR = Kind(linear=True, activation="identity")

M2IST_VISION = Case("vision", 64 * 400, 256, 128, 256, VISION * 6)
M2IST_TEXT = Case("text", 64 * 20, 768, 128, 768, TEXT * 6)

SHIPPED = (
    M2IST_VISION,
    M2IST_TEXT,
    replace(M2IST_VISION, precision="autocast"),
    replace(M2IST_TEXT, precision="fp16"),
    replace(M2IST_VISION, rows=64 * 100, precision="tf32"),
)

SMALL = Kind(shared=9, norm=True, scale=0.1), Kind(shared=None, activation="gelu"), Kind(activation="quick_gelu", out_norm=True)
EDGES = (
    Case("one", 1, 24, 1, 33, (Kind(),), "fp32"),
    Case("vision", 37, 40, 17, 40, VISION, "autocast"),
    Case("text", 21, 72, 17, 72, (Kind(shared=30, out_norm=True), TEXT[1]), "fp16"),
    Case("linear", 19, 24, 40, 40, (LINEAR, replace(LINEAR, norm=True, out_norm=True)), "tf32"),
    Case("mixed", 21, 24, 9, 24, SMALL),
)


def inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The bases and, as in "0.tap", the tensors of each adapter."""
    dtype = PRECISIONS[case.precision][0]

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    tensors = {f"base {i}": random(case.rows, case.width) for i in range(2)}
    for i, kind in enumerate(case.kinds):
        h = case.width if kind.linear else case.hidden
        shared = 0 if kind.linear else case.width if kind.shared is None else kind.shared
        own = 0 if kind.linear else case.width - shared
        found = {"tap": random(case.rows, case.depth).detach()}
        found |= {"down_weight": random(h, case.depth, scale=case.depth**-0.5), "down_bias": random(h)}
        for name, columns in (("up", own), ("shared", shared)):
            if columns:
                found |= {f"{name}_weight": random(columns, h, scale=h**-0.5), f"{name}_bias": random(columns)}
        if kind.norm:
            found |= {"norm_weight": random(case.depth), "norm_bias": random(case.depth)}
        if kind.out_norm:
            found |= {f"out_norm_{name}": random(case.width).detach() for name in ("weight", "bias")}
        tensors |= {f"{i}.{name}": tensor for name, tensor in found.items()}
    return tensors


def run(case: Case, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """out and the gradients of the tensors that require one."""
    adapters = []
    for i, kind in enumerate(case.kinds):
        own = {name.split(".")[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
        adapters.append(SideTap(**own, activation=kind.activation, scale=kind.scale))
    bases = [tensor for name, tensor in tensors.items() if name.startswith("base")]
    torch.manual_seed(0)
    with computing(case.precision, bases[0]):
        out = side_fusion(adapters, bases, backend=backend)
        return outputs_and_gradients({"out": out}, tensors)


def budget(case: Case, kernel: str) -> Budget:
    """What every kernel can have in 16 bits; float32 and rows that start anywhere take tiles of 16 rows."""
    products = kernel not in ("combine_kernel", "finish_kernel")  # which add, and read float32 partial sums
    exact = case.precision == "fp32"  # whose products have no tensor-core instruction
    bound = Budget(tensor_core=products and not exact)
    if not case.aligned:  # rows that start anywhere are loaded an element at a time
        return replace(bound, few_rows=True)
    bound = replace(bound, min_load_bytes=16, min_store_bytes=16, min_wide_load_share=0.75)
    if kernel == "finish_kernel":
        return replace(bound, min_store_bytes=8)
    if case.precision in ("tf32", "fp32"):  # wgmma wants both operands contiguous along the sum
        return replace(bound, few_rows=True, min_wide_load_share=0.4)
    return bound
