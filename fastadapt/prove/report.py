"""What a kernel's machine code costs: registers, spills, widths, occupancy; and budgets on them.

`fastadapt.prove.static` makes the reports; this file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """What one streaming multiprocessor has; shared memory in bytes, of which a block can use `shared_per_block`."""

    shared_per_block: int
    shared: int
    warps: int
    blocks: int
    tensor_core: frozenset[str]  # instruction kinds a matrix product should compile to


_KiB = 1024
ARCHS = {
    80: Arch(163 * _KiB, 164 * _KiB, warps=64, blocks=32, tensor_core=frozenset({"mma"})),
    89: Arch(99 * _KiB, 100 * _KiB, warps=48, blocks=24, tensor_core=frozenset({"mma"})),
    90: Arch(227 * _KiB, 228 * _KiB, warps=64, blocks=32, tensor_core=frozenset({"wgmma"})),
    100: Arch(227 * _KiB, 228 * _KiB, warps=64, blocks=32, tensor_core=frozenset({"tcgen05", "mma"})),
    120: Arch(99 * _KiB, 100 * _KiB, warps=48, blocks=24, tensor_core=frozenset({"mma"})),
}

# Common to all of them: four partitions of 16 Ki registers, given out 256 to a warp at a time, and 1 KiB of shared
# memory per block kept by the system.
_PARTITIONS, _PARTITION_REGS, _REG_UNIT, _SHARED_RESERVED, _SHARED_UNIT = 4, 16384, 256, _KiB, 128
_TENSOR_MEMORY_COLUMNS = 512

_TENSOR_CORE = {  # kind -> opcodes, the strongest first
    "tcgen05": re.compile(r"UTC\w*MMA"),
    "wgmma": re.compile(r"[HQI]GMMA"),
    "mma": re.compile(r"[HIQOD]MMA"),
}
_GLOBAL_LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")
_GLOBAL_STORES = ("STG", "UTMASTG")
_BULK = ("UTMALDG", "UTMASTG", "UBLKCP")  # the copy engine: whole tiles, on addresses aligned to 16 bytes
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # modifier -> bytes; none of them: 4


@dataclass(frozen=True)
class Report:
    """One kernel's machine code on one architecture.

    `regs` are 32-bit registers per thread, `stack` and `local` bytes per thread, `shared` bytes per block,
    `tensor_memory` columns per block; `mix` counts the instructions of the program text, not their executions, by full
    mnemonic ("LDG.E.128").
    """

    kernel: str
    arch: int
    num_warps: int
    regs: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    mix: Counter[str]

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of `opcodes` ("LDL") before their modifiers."""
        return sum(n for mnemonic, n in self.mix.items() if mnemonic.split(".")[0] in opcodes)

    @property
    def spill_loads(self) -> int:
        return self.count("LDL")

    @property
    def spill_stores(self) -> int:
        return self.count("STL")

    @property
    def fits(self) -> bool:
        """Whether a block gets the shared memory and the tensor memory it asks for."""
        shared_per_block = ARCHS[self.arch].shared_per_block
        return self.shared <= shared_per_block and self.tensor_memory <= _TENSOR_MEMORY_COLUMNS

    @property
    def blocks_per_sm(self) -> int:
        """Occupancy: blocks one multiprocessor holds at once; 0 if none fits."""
        arch = ARCHS[self.arch]
        warps = min(arch.warps, _PARTITIONS * (_PARTITION_REGS // _round_up(32 * self.regs, _REG_UNIT)))
        by_shared = arch.shared // _round_up(self.shared + _SHARED_RESERVED, _SHARED_UNIT)
        return min(arch.blocks, warps // self.num_warps, by_shared)

    @property
    def warps_per_sm(self) -> int:
        return self.blocks_per_sm * self.num_warps

    @property
    def tensor_core(self) -> str | None:
        """The strongest matrix instruction used: "tcgen05", "wgmma" or "mma"; None if there is none."""
        opcodes = {mnemonic.split(".")[0] for mnemonic in self.mix}
        return next((kind for kind, name in _TENSOR_CORE.items() if any(map(name.fullmatch, opcodes))), None)

    @property
    def load_widths(self) -> Counter[int]:
        """Loads from global memory: bytes per thread and instruction -> number of instructions."""
        return self._widths(_GLOBAL_LOADS)

    @property
    def store_widths(self) -> Counter[int]:
        """Stores to global memory: bytes per thread and instruction -> number of instructions."""
        return self._widths(_GLOBAL_STORES)

    @property
    def load_bytes(self) -> int:
        """Bytes of the widest load from global memory; 0 if nothing is loaded."""
        return max(self.load_widths, default=0)

    @property
    def store_bytes(self) -> int:
        """Bytes of the widest store to global memory; 0 if nothing is stored."""
        return max(self.store_widths, default=0)

    @property
    def wide_load_share(self) -> float:
        """Fraction of the bytes named by global loads that loads of 16 bytes or more name; 1 if there are none."""
        named = {width: width * n for width, n in self.load_widths.items()}
        return sum(size for width, size in named.items() if width >= 16) / sum(named.values()) if named else 1.0

    def _widths(self, opcodes: tuple[str, ...]) -> Counter[int]:
        widths: Counter[int] = Counter()
        for mnemonic, n in self.mix.items():
            if mnemonic.split(".")[0] in opcodes:
                widths[_width(mnemonic)] += n
        return widths


@dataclass(frozen=True)
class Budget:
    """Bounds on a Report, in its units; the defaults allow anything that fits and keeps its values in registers.

    With `tensor_core`, a matrix instruction of the architecture's own kind is wanted (wgmma on 90); with `few_rows` too, any kind
    will do, as the tiles have fewer rows than the others take.
    """

    max_regs: int = 255
    max_spills: int = 0
    max_local: int = 0
    min_blocks_per_sm: int = 1
    tensor_core: bool = False
    few_rows: bool = False
    min_load_bytes: int = 0
    min_store_bytes: int = 0
    min_wide_load_share: float = 0.0

    def violations(self, report: Report) -> list[str]:
        """Every bound `report` breaks, each a sentence with the number found and the number allowed."""
        arch = ARCHS[report.arch]
        at_most = [
            (report.regs, self.max_regs, "registers per thread"),
            (report.spill_loads + report.spill_stores, self.max_spills, "spill instructions"),
            (report.stack + report.local, self.max_local, "bytes of local memory per thread"),
            (report.shared, arch.shared_per_block, "bytes of shared memory per block"),
            (report.tensor_memory, _TENSOR_MEMORY_COLUMNS, "columns of tensor memory"),
        ]
        at_least = [
            (report.blocks_per_sm, self.min_blocks_per_sm, "blocks per multiprocessor"),
            (report.load_bytes, self.min_load_bytes, "bytes in the widest global load"),
            (report.store_bytes, self.min_store_bytes, "bytes in the widest global store"),
            (round(report.wide_load_share, 3), self.min_wide_load_share, "of the bytes loaded 16 or more at a time"),
        ]
        broken = [f"{found} {what}, at most {limit} allowed" for found, limit, what in at_most if found > limit]
        broken += [f"{found} {what}, at least {limit} wanted" for found, limit, what in at_least if found < limit]
        kinds = set(_TENSOR_CORE) if self.few_rows else arch.tensor_core
        if self.tensor_core and report.tensor_core not in kinds:
            wanted = " or ".join(sorted(kinds))
            broken.append(f"tensor-core instruction {report.tensor_core}, {wanted} wanted")
        return [f"{report.kernel} on sm_{report.arch}: {problem}" for problem in broken]


def _width(mnemonic: str) -> int:
    opcode, *modifiers = mnemonic.split(".")
    if opcode in _BULK:
        return 16
    return next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
