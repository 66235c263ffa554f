"""HiVG's parameters, operations and memory, against those counted of the released code."""

from __future__ import annotations

import pytest
import torch

from fastadapt.models.common.table import count_parts, trained
from fastadapt.models.hivg import HiVGConfig, HiVGForGrounding
from fastadapt.models.hivg.method import METHOD
from fastadapt.models.plan import measure as plan
from fastadapt.models.plan.gpus import gpu
from fastadapt.models.plan.trace import Trace
from fastadapt.prove.meta import as_on_cuda, autocast
from fastadapt.prove.saved import saved_bytes


def saved(arm: str, dtype: torch.dtype, batch: int, **changes) -> float:
    """MiB a sample that a training step at the published size keeps on a GPU."""
    model = plan.make(METHOD, arm, "base-refcoco-stage3", **changes)
    inputs = METHOD.inputs(model.config, batch, "meta")
    with as_on_cuda(), autocast(dtype):
        kept = saved_bytes(lambda: model(**inputs).loss, [*model.parameters(), *model.buffers(), *inputs.values()])
    return kept / batch / 2**20


@pytest.mark.parametrize(
    "preset, forward, whole", [("base-refcoco-stage3", 74.90, 184.1), ("base-refcocog-stage0", 77.57, 184.1)]
)
def test_operations_are_those_of_the_release(preset, forward, whole):
    model = plan.make(METHOD, "release", preset, parity="released")
    inputs = METHOD.inputs(model.config, 2, "meta")
    with as_on_cuda(triton=False), Trace(gpu("H200")) as trace:
        loss = model(**inputs).loss
        assert trace.flops / 2e9 == pytest.approx(forward, abs=0.005)
        loss.backward()
    assert trace.flops / 2e9 == pytest.approx(whole, abs=0.05)


def test_saved_bytes_are_those_of_the_release_and_the_target():
    """The release was measured on a CPU, 452.3 MiB a sample, where a dropout's mask is in float32; on a GPU that makes 398."""
    assert saved("release", torch.float32, 40, parity="released") == pytest.approx(398, rel=0.01)
    assert saved("fastadapt", torch.bfloat16, 40) <= 95
    model = plan.make(METHOD, "release", "base-refcoco-stage3", parity="released")
    kept = []
    for batch in (2, 4):
        inputs = METHOD.inputs(model.config, batch, "meta")
        kept.append(saved_bytes(lambda: model(**inputs).loss, [*model.parameters(), *model.buffers(), *inputs.values()]))
    assert (kept[1] - kept[0]) / 2 / 2**20 == pytest.approx(452.3, rel=0.01)


@pytest.mark.parametrize(
    "stage, image, count",
    [(0, 0, 59_691_780), (1, 983_040, 62_247_684), (2, 1_572_864, 62_837_508), (3, 2_359_296, 63_623_940)],
)
def test_parameters_are_the_released_ones(stage, image, count):
    with torch.device("meta"):
        model = HiVGForGrounding(HiVGConfig.preset(f"base-refcoco-stage{stage}", parity="released"))
    assert (sum(p.numel() for p in model.parameters()), trained(model)) == (213_244_677, count)
    parts = {part: (total, tuned) for part, total, tuned in count_parts(model, METHOD.parts)}
    assert parts["image tower's LoRA"] == (2_359_296, image)
    assert parts["text tower's LoRA"] == (1_572_864, 1_572_864 if stage else 0)
    frozen = {"CLIP's image tower": 85_799_424, "CLIP's text tower": 63_165_952, "CLIP's projections and logit scale": 655_361}
    whole = {
        "bridges, LoRA on their projections": 786_432, "bridges, adaptive weights": 157_696, "bridges, gate": 1_575_936,
        "bridges, cross-attention": 9_449_472, "bridges, MLP": 18_889_728, "bridges, LayerNorm": 6_144,
        "dead parameters of the release": 847_616, "projection of the image's levels": 1_573_376,
        "projections of image and text": 525_312, "REG token and positions": 141_312, "fusion encoder": 18_915_328,
        "box head": 527_364, "token head": 3_150_336, "segmentation head": 3_145_728,
    }  # fmt: skip
    assert {part: parts[part] for part in frozen} == {part: (n, 0) for part, n in frozen.items()}
    assert {part: parts[part] for part in whole} == {part: (n, n) for part, n in whole.items()}


def test_parameters_of_the_other_presets():
    counts = {}
    for preset, parity in {
        "base-refcoco+-stage0": "released", "base-refcocog-stage0": "released", "large-refcoco-stage0": "released",
        "large-refcoco-stage3": "released", "base-refcoco-stage0": (), "base-refcoco-stage3": (),
    }.items():  # fmt: skip
        with torch.device("meta"):
            model = HiVGForGrounding(HiVGConfig.preset(preset, parity=parity))
        counts[preset, bool(parity)] = sum(p.numel() for p in model.parameters()), trained(model)
    assert counts["large-refcoco-stage0", True] == (543_390_725, 107_123_460)
    assert counts["large-refcoco-stage3", True] == (543_390_725, 107_123_460 + 12 * 4 * 2 * 32 * (1024 + 768))
    # in millions as published: 215.4 and 61.8 with two text states, 236.6 and 83.1 with twelve
    assert [f"{n / 1e6:.1f}" for n in counts["base-refcoco+-stage0", True]] == ["215.4", "61.8"]
    assert [f"{n / 1e6:.1f}" for n in counts["base-refcocog-stage0", True]] == ["236.6", "83.1"]
    # without dead parameters and the bridges' LoRA; and the pairs of three stages of which one trains
    effective = 59_691_780 - 847_616 - 786_432
    assert counts["base-refcoco-stage0", False][1] == effective
    image = 5 * 4 * 49_152  # pairs of the first five blocks
    assert counts["base-refcoco-stage3", False] == (
        213_244_677 - 847_616 - 786_432 + 2 * 1_572_864 + 2 * image + 3 * 4 * 49_152, effective + 2_359_296 + 1_572_864
    )  # fmt: skip
