"""loca's kernels keep their budgets on every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastadapt.kernels.loca import cases, triton_grad_kernel, triton_inference_kernel, triton_kernel
from fastadapt.kernels.loca.cases import Case
from fastadapt.prove.report import ARCHS
from fastadapt.prove.static import compile_launches
from fastadapt.prove.table import build, launches

TIGHT = (
    Case(32, 37, 37, channels=(192, 32, 128)),  # the widest that the kernels take
    Case(32, 37, 37, channels=(192, 32, 128), training=False),
    Case(7, 5, 9, depth=100, channels=(33, 9, 17)),
    Case(7, 5, 9, depth=100, channels=(33, 9, 17), training=False),
)


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_are_kept(arch: int) -> None:
    # beyond what is shipped, 89 would repeat 120, and 100 would repeat 90
    tried = SimpleNamespace(**vars(cases) | {"SHIPPED": cases.SHIPPED if arch in (89, 100) else (*cases.SHIPPED, *TIGHT)})
    rows = build({"loca": tried}, [arch])
    modules = triton_kernel, triton_grad_kernel, triton_inference_kernel
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {row.report.kernel for row in rows} == kernels
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []


@pytest.mark.parametrize(("arch", "kind"), [(80, "mma"), (89, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")])
def test_products_run_on_the_architectures_own_tensor_cores(arch: int, kind: str) -> None:
    shipped = [launch for case in (cases.SHIPPED[0], cases.SHIPPED[3]) for launch in launches(cases, case, arch)]
    reports = compile_launches([(launch, arch) for launch in shipped if launch.name != "prepare_kernel"])
    assert {report.tensor_core for report in reports} == {kind}
