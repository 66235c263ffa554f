"""Kernels compile for every architecture with no GPU, and the machine code is read correctly."""

from __future__ import annotations

import pytest
import torch
import triton

from fastadapt.core import masked_kernel
from fastadapt.core.launch import Launch, recording
from fastadapt.prove import interpreter
from fastadapt.prove.report import ARCHS, Budget, Report
from fastadapt.prove.static import compile_launch, compile_launches
from tests.prove import kernels


def empty(*shape: int, device: str = "meta") -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def matmul(rows: int = 256, x: torch.Tensor | None = None, device: str = "meta", **options: int) -> Launch:
    """One 64 x 64 tile per block of (rows, 512) @ (512, 192)."""
    x = empty(rows, 512, device=device) if x is None else x
    w, y = empty(192, 512, device=device), empty(rows, 192, device=device)
    args = (x, w, y, rows, 192, 512, *x.stride(), w.stride(0), y.stride(0))
    meta = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3, **options}
    return Launch(kernels.matmul, (4, 3), args, meta)


def cast(x: torch.Tensor, n: int) -> Launch:
    return Launch(kernels.cast, (1,), (x, empty(1 << 20), n), {"BLOCK": 1024, "num_warps": 4})


@pytest.fixture(scope="module")
def matmuls() -> dict[int, Report]:
    return dict(zip(ARCHS, compile_launches((matmul(), arch) for arch in ARCHS)))


@pytest.mark.parametrize("arch", ARCHS)
def test_matmul_keeps_a_strict_budget(matmuls: dict[int, Report], arch: int) -> None:
    budget = Budget(
        max_regs=168,
        min_blocks_per_sm=2,
        tensor_core=True,
        min_load_bytes=16,
        min_store_bytes=16,
        min_wide_load_share=1.0,
    )
    report = matmuls[arch]
    assert budget.violations(report) == []
    assert (report.kernel, report.arch, report.num_warps) == ("matmul", arch, 4)
    assert report.shared >= 2 * 2 * 64 * 32 * 2  # two stages of two bfloat16 tiles


@pytest.mark.parametrize(("arch", "kind"), [(80, "mma"), (89, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")])
def test_tensor_core_kind(matmuls: dict[int, Report], arch: int, kind: str) -> None:
    assert matmuls[arch].tensor_core == kind


def test_small_tile_on_sm_90_has_no_wgmma() -> None:
    report = compile_launch(matmul(BM=16), 90)
    assert Budget(tensor_core=True).violations(report) == ["matmul on sm_90: tensor-core instruction mma, wgmma wanted"]


class TestAlignment:
    """The width of an access follows the alignment that a meta tensor's view has."""

    def test_aligned(self) -> None:
        report = compile_launch(cast(empty(1 << 20), 1 << 20), 90)
        assert (report.load_bytes, report.store_bytes, report.wide_load_share) == (16, 16, 1.0)

    def test_misaligned_view(self) -> None:
        report = compile_launch(cast(empty(1 << 21)[1:], 1 << 20), 90)
        assert (report.load_bytes, report.store_bytes, report.wide_load_share) == (2, 16, 0.0)

    def test_length_that_16_does_not_divide(self) -> None:
        report = compile_launch(cast(empty(1 << 20), (1 << 20) - 1), 90)
        assert (report.load_bytes, report.store_bytes) == (2, 2)

    def test_one_misaligned_operand_shows_in_the_share(self) -> None:
        report = compile_launch(matmul(x=empty(256, 528)[:, 1:513]), 90)
        assert report.load_bytes == 16
        assert 0.2 < report.wide_load_share < 0.8

    def test_real_tensors_compile_to_the_same_code(self, matmuls: dict[int, Report]) -> None:
        assert compile_launch(matmul(device="cpu"), 90) is matmuls[90]


def test_spills_are_found() -> None:
    report = compile_launch(matmul(maxnreg=32), 80)
    assert report.spill_loads > 0 and report.spill_stores > 0 and report.stack > 0
    spills, stack = report.spill_loads + report.spill_stores, report.stack
    assert Budget(max_regs=24).violations(report) == [
        "matmul on sm_80: 32 registers per thread, at most 24 allowed",
        f"matmul on sm_80: {spills} spill instructions, at most 0 allowed",
        f"matmul on sm_80: {stack} bytes of local memory per thread, at most 0 allowed",
    ]


def test_shared_memory_that_fits_one_architecture_and_not_another() -> None:
    big, small = compile_launches((matmul(BK=64, num_stages=8), arch) for arch in (80, 89))
    assert big.fits and big.blocks_per_sm == 1
    assert not small.fits and small.blocks_per_sm == 0
    assert Budget().violations(small) == [
        f"matmul on sm_89: {small.shared} bytes of shared memory per block, at most 101376 allowed",
        "matmul on sm_89: 0 blocks per multiprocessor, at least 1 wanted",
    ]


def test_tuple_and_none_arguments() -> None:
    sources = (empty(3), empty(1 << 20))
    args = (sources, None, empty(1 << 20), 1 << 20)
    report = compile_launch(Launch(kernels.copy_chosen, (1,), args, {"WHICH": 1, "BLOCK": 1024}), 90)
    assert report.load_widths == {16: 1} and report.tensor_core is None


class TestMemo:
    def test_equal_specialisations_are_one_report(self, matmuls: dict[int, Report]) -> None:
        once, twice = compile_launches([(matmul(), 90), (matmul(rows=272), 90)])
        assert once is twice is matmuls[90]

    def test_other_options_are_another_report(self, matmuls: dict[int, Report]) -> None:
        assert compile_launch(matmul(num_stages=2), 90) is not matmuls[90]


class TestErrors:
    def test_kernel_that_does_not_compile(self, matmuls: dict[int, Report]) -> None:
        with pytest.raises(triton.CompilationError):
            compile_launches([(matmul(), 90), (Launch(kernels.changes_type, (1,), (empty(16), 3), {}), 90)])
        assert compile_launch(matmul(), 90) is matmuls[90]  # and nothing is left in the way of the next one

    def test_unknown_architecture(self) -> None:
        with pytest.raises(ValueError, match=r"arch: expected one of \[80, 89, 90, 100, 120\], got 75"):
            compile_launch(matmul(), 75)

    def test_interpreted_kernel(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        with pytest.raises(RuntimeError, match="matmul .* TRITON_INTERPRET=0"):
            compile_launch(Launch(InterpretedFunction(kernels.matmul.fn), (1,), (), {}), 90)

    def test_interpreter_shims_need_the_interpreter(self) -> None:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            interpreter.install()


def test_active_driver_is_left_as_it_was() -> None:
    from triton.runtime.driver import driver

    before = driver._active
    compile_launch(matmul(), 80)
    assert driver._active is before


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropouts_kernel_moves_sixteen_bytes_at_a_time(arch: int, dtype: torch.dtype) -> None:
    x, seed = torch.empty(1370, 768, dtype=dtype, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    with recording() as started:
        masked_kernel.masked(x, seed, 6554, 0)
    (report,) = compile_launches((launch, arch) for launch in started)
    assert Budget(min_load_bytes=16, min_store_bytes=16).violations(report) == []
