"""The report's section on machine code: what the kernels compiled to, by architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.html import Cell, folded, heading, paragraph, table
from bench.rows import Row
from bench.summary import of_kind


def static(rows: Sequence[Row]) -> str:
    found = [row.values for row in of_kind(rows, "static")]
    if not found:
        return ""
    text = (
        "Compiled in this run for each architecture, without a GPU, and read from the machine code: the worst of every "
        "kernel's variants. Registers a thread, shared memory a block, blocks that a multiprocessor holds, the matrix "
        "instruction; sm_90 should multiply with wgmma, and nothing should spill."
    )
    archs, kernels = (sorted({values[name] for values in found}) for name in ("sm", "kernel"))
    lines: list[list[object]] = []
    for kernel in kernels:
        variants = [
            [values for values in found if (values["kernel"], values["sm"]) == (kernel, arch)] for arch in archs
        ]
        lines.append([kernel, *map(_machine_code, variants)])
    broken = [values["violations"] for values in found if values["violations"]]
    verdict = "Broken budgets: " + "; ".join(broken) if broken else f"All {len(found)} variants keep their budgets."
    parts = [
        heading("The kernels' machine code"),
        paragraph(text),
        table(["kernel", *(f"sm_{arch}" for arch in archs)], lines),
    ]
    parts.append(paragraph(verdict))
    for arch in archs:
        chosen = [values for values in found if values["sm"] == arch]
        columns = [name for name in chosen[0] if name not in ("sm", "violations")]
        detail = table(columns, [[Cell(values[name]) for name in columns] for values in chosen])
        parts.append(folded(f"sm_{arch}: all {len(chosen)} variants", detail))
    return "".join(parts)


def _machine_code(variants: Sequence[dict[str, Any]]) -> Cell:
    """The worst of a kernel's variants on one architecture."""
    if not variants:
        return Cell("-", "text")
    regs, shared, spills = (max(values[name] for values in variants) for name in ("regs", "shared", "spills"))
    blocks, cores = (
        min(values["blocks/SM"] for values in variants),
        {values["tensor core"] for values in variants} - {None},
    )
    parts = [
        f"{regs} regs",
        f"{shared / 1024:.0f} KiB",
        f"{blocks}/SM",
        *sorted(cores),
        *([f"{spills} spills"] if spills else []),
    ]
    return Cell(", ".join(parts), "text failed" if any(values["violations"] for values in variants) else "text")
