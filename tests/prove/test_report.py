"""What is derived from a kernel's machine code: occupancy, tensor-core kind, access widths, budgets."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fastadapt.prove.report import Budget, Report

PLAIN = Report("k", 90, num_warps=4, regs=32, stack=0, local=0, shared=0, tensor_memory=0, mix=Counter())


@pytest.mark.parametrize(
    ("arch", "num_warps", "regs", "shared", "blocks"),
    [
        (80, 4, 32, 0, 16),  # 64 warps
        (89, 4, 32, 0, 12),  # 48 warps
        (90, 1, 16, 0, 32),  # 32 blocks
        (120, 1, 16, 0, 24),  # 24 blocks
        (90, 4, 128, 0, 4),  # 16 warps' worth of registers
        (90, 4, 129, 0, 3),  # 136 after rounding up: three warps to a partition
        (90, 12, 168, 0, 1),
        (90, 4, 255, 0, 2),
        (90, 4, 32, 113 * 1024, 2),  # 2 x (113 + 1) KiB is all there is
        (90, 4, 32, 113 * 1024 + 1, 1),
        (90, 4, 32, 227 * 1024, 1),
        (90, 4, 32, 228 * 1024, 0),
        (120, 8, 64, 50 * 1024, 1),
    ],
)
def test_occupancy(arch: int, num_warps: int, regs: int, shared: int, blocks: int) -> None:
    report = replace(PLAIN, arch=arch, num_warps=num_warps, regs=regs, shared=shared)
    assert (report.blocks_per_sm, report.warps_per_sm) == (blocks, blocks * num_warps)


@pytest.mark.parametrize(
    ("opcodes", "kind"),
    [
        (["FFMA"], None),
        (["HMMA.16816.F32.BF16", "FFMA"], "mma"),
        (["HGMMA.64x128x16.F32.BF16", "HMMA.16816.F32.BF16"], "wgmma"),
        (["UTCHMMA", "HMMA.16816.F32.BF16"], "tcgen05"),
        (["UTCBAR", "UTCATOMSWS.AND"], None),
    ],
)
def test_tensor_core_kind(opcodes: list[str], kind: str | None) -> None:
    assert replace(PLAIN, mix=Counter(opcodes)).tensor_core == kind


def test_access_widths() -> None:
    loads = {"LDG.E.128.CONSTANT": 2, "LDGSTS.E.BYPASS.128": 1, "LDG.E.U16": 4, "LDG.E": 2, "LDS.128": 9}
    report = replace(PLAIN, mix=Counter({**loads, "STG.E.64": 3}))
    assert report.load_widths == {16: 3, 2: 4, 4: 2}
    assert report.store_widths == {8: 3}
    assert (report.load_bytes, report.store_bytes) == (16, 8)
    assert report.wide_load_share == 48 / 64
    assert (PLAIN.load_bytes, PLAIN.wide_load_share) == (0, 1.0)


def test_budget_kept() -> None:
    assert Budget().violations(PLAIN) == []


@pytest.mark.parametrize(
    ("budget", "report", "violation"),
    [
        (Budget(max_regs=128), replace(PLAIN, regs=168), "168 registers per thread, at most 128 allowed"),
        (Budget(), replace(PLAIN, mix=Counter({"LDL.64": 3, "STL": 4})), "7 spill instructions, at most 0 allowed"),
        (Budget(), replace(PLAIN, stack=40), "40 bytes of local memory per thread, at most 0 allowed"),
        (Budget(min_blocks_per_sm=3), replace(PLAIN, regs=255), "2 blocks per multiprocessor, at least 3 wanted"),
        (Budget(tensor_core=True), replace(PLAIN, mix=Counter(["HMMA"])), "tensor-core instruction mma, wgmma wanted"),
        (Budget(tensor_core=True), replace(PLAIN, arch=100), "tensor-core instruction None, mma or tcgen05 wanted"),
        (
            Budget(min_load_bytes=16),
            replace(PLAIN, mix=Counter(["LDG.E.U16"])),
            "2 bytes in the widest global load, at least 16 wanted",
        ),
        (Budget(min_store_bytes=16), PLAIN, "0 bytes in the widest global store, at least 16 wanted"),
        (
            Budget(min_wide_load_share=0.9),
            replace(PLAIN, mix=Counter({"LDG.E.128": 1, "LDG.E.U16": 8})),
            "0.5 of the bytes loaded 16 or more at a time, at least 0.9 wanted",
        ),
        (
            Budget(min_blocks_per_sm=0),
            replace(PLAIN, arch=89, shared=131072),
            "131072 bytes of shared memory per block, at most 101376 allowed",
        ),
        (Budget(), replace(PLAIN, tensor_memory=1024), "1024 columns of tensor memory, at most 512 allowed"),
    ],
)
def test_budget_broken(budget: Budget, report: Report, violation: str) -> None:
    assert budget.violations(report) == [f"k on sm_{report.arch}: {violation}"]
