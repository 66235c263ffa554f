"""light_interaction's kernels keep their budgets on every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastadapt.kernels.light_interaction import cases, triton_kernel
from fastadapt.kernels.light_interaction.cases import Case
from fastadapt.prove.report import ARCHS
from fastadapt.prove.static import compile_launches
from fastadapt.prove.table import build, launches

NARROW = (Case(32, 676, 17, 32, 4), Case(32, 676, 16, 16, 1, masked=True, precision="fp32"))


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_are_kept(arch: int) -> None:
    # beyond what is shipped, 89 would repeat 120, and 100 would repeat 90
    tried = SimpleNamespace(**vars(cases) | {"SHIPPED": cases.SHIPPED + (() if arch in (89, 100) else NARROW)})
    rows = build({"light_interaction": tried}, [arch])
    assert {row.report.kernel for row in rows} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []


def test_products_over_the_image_run_on_hoppers_own_tensor_cores() -> None:
    reports = compile_launches([(launch, 90) for launch in launches(cases, cases.SHIPPED[0], 90)])
    over_image = ("forward_kernel", "over_image_backward_kernel", "over_words_backward_kernel", "weight_grads_kernel")
    assert {report.tensor_core for report in reports if report.kernel in over_image} == {"wgmma"}
