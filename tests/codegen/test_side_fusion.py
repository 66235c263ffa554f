"""Machine code of side_fusion's kernels: M2IST's towers whole on one architecture, a layer of them on others, and tight calls.

How many adapters a group has changes what chooses their pointers and nothing else, so a layer stands for all.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fastadapt.kernels.side_fusion import cases, triton_grad_kernel, triton_kernel
from fastadapt.kernels.side_fusion.cases import LINEAR, M2IST_TEXT, M2IST_VISION, TEXT, VISION, Case, Kind
from fastadapt.prove.table import Row, build

VISION_LAYER, TEXT_LAYER = replace(M2IST_VISION, kinds=VISION), replace(M2IST_TEXT, kinds=TEXT)
WIDE = Case("wide", 25600, 256, 256, 256, (Kind(shared=100, norm=True, activation="gelu"), LINEAR))
TRIED = {  # 89 would repeat 120
    80: (VISION_LAYER, TEXT_LAYER, WIDE),
    90: (M2IST_VISION, M2IST_TEXT),
    100: (VISION_LAYER,),
    120: (replace(VISION_LAYER, precision="autocast"), replace(VISION_LAYER, rows=6400, precision="tf32")),
}


def compiled(arch: int) -> list[Row]:
    return build({"side_fusion": SimpleNamespace(**vars(cases) | {"SHIPPED": TRIED[arch]})}, [arch])


@pytest.mark.parametrize("arch", TRIED)
def test_budgets_are_kept(arch: int) -> None:
    rows = compiled(arch)
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []
    if M2IST_TEXT in TRIED[arch]:
        named = {name for module in (triton_kernel, triton_grad_kernel) for name in vars(module) if name.endswith("_kernel")}
        assert {row.report.kernel for row in rows} == named
        assert {row.report.tensor_core for row in rows} == {"wgmma", None}
