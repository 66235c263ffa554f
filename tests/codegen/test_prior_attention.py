"""prior_attention's kernels keep their budgets on every architecture, with every size of tile that config can choose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastadapt.kernels.prior_attention import cases, config, triton_kernel
from fastadapt.kernels.prior_attention.cases import Case
from fastadapt.prove.cases import PRECISIONS
from fastadapt.prove.report import ARCHS
from fastadapt.prove.static import compile_launches
from fastadapt.prove.table import build, launches

KEYS = (16, 32, 64, 128, 256)


def served(arch: int, precision: str, head_width: int) -> list[Case]:
    """Long calls over as many keys as there are tiles for, up to what the architecture holds."""
    most = config.most_keys(head_width, PRECISIONS[precision][0].itemsize, arch)
    return [Case(32, 1370, keys, 12, head_width, True, precision) for keys in KEYS if keys <= most]


def violations(arch: int, tried: list[Case]) -> list[str]:
    rows = build({"prior_attention": SimpleNamespace(**vars(cases) | {"SHIPPED": tried})}, [arch])
    assert len(rows) >= len(tried)
    return [f"{row.case}: {violation}" for row in rows for violation in row.violations]


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_are_kept(arch: int) -> None:
    assert violations(arch, list(cases.SHIPPED)) == []


# 89 would repeat 120, and 100 would repeat 90; a head 8 wide has the tiles of one 16 wide
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("head_width", [16, 64])
def test_budgets_are_kept_with_the_tiles_of_any_number_of_keys(arch: int, precision: str, head_width: int) -> None:
    assert violations(arch, served(arch, precision, head_width)) == []


@pytest.mark.parametrize(("arch", "kind"), [(80, "mma"), (89, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")])
def test_products_run_on_the_architectures_own_tensor_cores(arch: int, kind: str) -> None:
    found = launches(cases, Case(32, 1370, 64, 12, 64), arch)
    reports = compile_launches([(launch, arch) for launch in found])
    products = [report.tensor_core for report in reports if report.kernel != "sum_kernel"]
    assert products == [kind, kind]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_cases_reach_every_kernel(arch: int) -> None:
    found = {launch.name for case in cases.SHIPPED for launch in launches(cases, case, arch)}
    assert found == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
