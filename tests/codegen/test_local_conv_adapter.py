"""local_conv_adapter's kernels keep their budgets on every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastadapt.kernels.local_conv_adapter import cases, triton_kernel
from fastadapt.prove.report import ARCHS
from fastadapt.prove.table import build


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_are_kept(arch: int) -> None:
    # 89 would repeat 120, and 100 would repeat 90
    chosen = cases.SHIPPED[:1] if arch in (89, 100) else cases.SHIPPED
    rows = build({"local_conv_adapter": SimpleNamespace(**vars(cases) | {"SHIPPED": chosen})}, [arch])
    assert {row.report.kernel for row in rows} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []


def test_the_tightest_tiles_of_few_rows_and_of_rows_that_start_anywhere() -> None:
    tight = (
        cases.Case(1, cases.DINO, 1024, 256, (3, 7), scale="rows", residual=True, precision="autocast"),
        cases.Case(32, cases.DINO, 701, 121, (7, 7), scale="rows", residual=True, precision="tf32"),
    )
    rows = build({"local_conv_adapter": SimpleNamespace(**vars(cases) | {"SHIPPED": tight})}, [80])
    assert {row.case for row in rows} == {case.name for case in tight}
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []
