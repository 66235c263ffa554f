"""lora_linear's kernels keep their budgets on every architecture, with every tile that config can choose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fastadapt.kernels.lora_linear import cases, config, triton_kernel
from fastadapt.kernels.lora_linear.cases import DINO, TEXT, VIT, Case
from fastadapt.kernels.lora_linear.config import Problem, Tiles
from fastadapt.prove.report import ARCHS
from fastadapt.prove.static import compile_launches
from fastadapt.prove.table import build, launches

ODD = (
    Case(TEXT, 769, ((1023, 17),), dropout_p=0.0),
    Case(TEXT, 100, ((70, 3), (33, 17))),
    Case(TEXT, 776, ((776, 8),)),  # a multiple of 16 bytes, which Triton is not told of
)
TIGHT = (
    Case(VIT, 768, ((768, 64),), dropout_p=0.0),
    Case(DINO, 768, ((768, 64),) * 3),
    Case(VIT, 768, ((768, 64),) * 3, precision="fp32"),
)
ALL = (*cases.SHIPPED, *ODD, *TIGHT)
PRODUCTS = ("forward_kernel", "grad_input_kernel")


@pytest.mark.parametrize("arch", ARCHS)
def test_budgets_are_kept(arch: int) -> None:
    # beyond what is shipped, 89 would repeat 120, and 100 would repeat 90
    tried = SimpleNamespace(**vars(cases) | {"SHIPPED": cases.SHIPPED if arch in (89, 100) else ALL})
    rows = build({"lora_linear": tried}, [arch])
    assert len(rows) > len(cases.SHIPPED)
    assert [f"{row.case}: {violation}" for row in rows for violation in row.violations] == []


@pytest.mark.parametrize(("arch", "kind"), [(80, "mma"), (89, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")])
def test_products_run_on_the_architectures_own_tensor_cores(arch: int, kind: str) -> None:
    reports = compile_launches([(launch, arch) for launch in launches(cases, cases.SHIPPED[0], arch)])
    assert {report.tensor_core for report in reports if report.kernel in PRODUCTS} == {kind}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_cases_reach_every_kernel_and_every_tile(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = set()
    gemm_tiles = config.gemm_tiles

    def noting(problem: Problem) -> Tiles:
        offered.update(tiles for tiles, _ in config.candidates(problem))
        return gemm_tiles(problem)

    monkeypatch.setattr(config, "gemm_tiles", noting)
    found = [launch for case in ALL for launch in launches(cases, case, arch)]
    assert {launch.name for launch in found} == {name for name in vars(triton_kernel) if name.endswith("_kernel")}
    metas = [launch.meta for launch in found if launch.name in PRODUCTS]
    assert {meta["FUSED"] for meta in metas} == {True, False}
    sizes = ("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
    assert {Tiles(*(meta[size] for size in sizes)) for meta in metas} == offered
