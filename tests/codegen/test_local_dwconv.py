"""local_dwconv's kernels keep their budgets on every architecture, with every height of tile that config can choose."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from fastadapt.kernels.local_dwconv import cases, triton_kernel
from fastadapt.kernels.local_dwconv.cases import DINO, VIT, Case
from fastadapt.prove.report import ARCHS
from fastadapt.prove.table import build

# any pair of kernel sizes, and float32 taps that 16-bit tokens meet
TIGHT = (
    *(Case(32, DINO, 768, kernel) for kernel in product((3, 5, 7), repeat=2) if kernel[0] != kernel[1]),
    Case(32, DINO, 768, precision="autocast"),
    Case(32, DINO, 768, (5, 5), precision="autocast"),
    Case(32, VIT, 768, (7, 7), precision="autocast"),
    Case(32, VIT, 768, (5, 5), precision="fp32"),
    Case(32, VIT, 768, (7, 7), precision="fp32"),
)


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_are_kept(arch: int) -> None:
    # beyond what is shipped, 89 would repeat 120, and 100 would repeat 90
    chosen = cases.SHIPPED if arch in (89, 100) else (*cases.SHIPPED, *TIGHT)
    rows = build({"local_dwconv": SimpleNamespace(**vars(cases) | {"SHIPPED": chosen})}, [arch])
    assert {row.report.kernel for row in rows} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []
