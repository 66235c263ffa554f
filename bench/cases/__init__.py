"""The table of cases: every workload that can be measured, by name."""

from __future__ import annotations

from bench.case import Case
from bench.cases import clip_lora, lora_linear
from bench.cases.lora_linear import Shape

VIT, DINO = 32 * 197, 32 * 1370  # tokens of a batch of 32 images at 224 and 518 pixels
REDUCED = 2 * 197  # rows that a CPU can measure in reasonable time

# fixed before anything was measured: the widths of ViT-B and ViT-L, LoRA's usual ranks, the dtypes that training uses
SHAPES: tuple[Shape, ...] = (
    *(Shape(rows, k, n) for rows in (VIT, DINO) for k, n in ((768, 768), (768, 3072), (3072, 768))),
    *(Shape(DINO, k, n) for k, n in ((1024, 1024), (1024, 4096))),
    *(Shape(rows, 768, 768, members=3) for rows in (VIT, DINO)),
    *(Shape(DINO, 768, n, r=r) for n in (768, 3072) for r in (8, 64)),
    *(Shape(DINO, 768, n, dropout=0.0) for n in (768, 3072)),
    *(Shape(DINO, 768, 768, precision=precision) for precision in ("fp16", "fp32", "autocast")),
    Shape(DINO, 768, 3072, precision="autocast", dropout=0.0),
)
REDUCED_SHAPES: tuple[Shape, ...] = (
    *(Shape(REDUCED, k, n, precision="fp32") for k, n in ((768, 768), (768, 3072), (3072, 768))),
    Shape(REDUCED, 768, 768, precision="fp32", members=3),
    Shape(REDUCED, 768, 768, precision="fp32", dropout=0.0),
    Shape(REDUCED, 768, 768, precision="autocast"),
)
CLIP = {"cuda": (("bfloat16", 32), ("float32 under bfloat16 autocast", 32)), "cpu": (("float32", 4),)}


def operation_cases(device: str) -> dict[str, Case]:
    """The cases of single operations for "cuda" or "cpu", by name; a CPU gets fewer rows."""
    shapes = SHAPES if device == "cuda" else REDUCED_SHAPES
    return {shape.name: lora_linear.case(shape) for shape in shapes}


def model_cases(device: str) -> dict[str, Case]:
    """The training steps that the main job measures on "cuda" or "cpu", by name."""
    return {case.name: case for case in (clip_lora.case(*setting) for setting in CLIP[device])}


def find(name: str) -> Case:
    """The case of that name.

    Raises ValueError with the names there are.
    """
    cases = {
        name: case
        for device in CLIP
        for table in (operation_cases, model_cases)
        for name, case in table(device).items()
    }
    if name not in cases:
        raise ValueError("case: expected one of\n  " + "\n  ".join(cases) + f"\ngot {name!r}")
    return cases[name]
