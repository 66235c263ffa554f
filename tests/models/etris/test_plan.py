"""What ETRIS needs, against what was counted of its released code, and against what it should need here."""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
from torch.nn import functional as F

from fastadapt.models.common.method import method
from fastadapt.models.plan import measure
from fastadapt.models.plan.gpus import gpu
from fastadapt.prove import meta

ETRIS, MIB, H200 = method("etris"), 2**20, gpu("h200")

# counted of the released code on a CPU, MiB a sample in float32
COUNTED = {
    "vit-b": {"image tower": 337.7, "text tower": 5.6, "Bridger": 25.4, "HA": 42.3, "GA": 215, "Projector": 68.7},
    "r101": {"image tower": 228, "text tower": 5.6, "Bridger": 88.7, "HA": 41.0, "GA": 215, "Projector": 68.7},
}
TOTAL = {"vit-b": 696.2, "r101": 648.6}
ATTENTION = 12 * 2 * 2 * 677**2 * 768 / 1e9  # GFLOP of the ViT's attention, which was not counted


@cache
def a_step(arm: str, preset: str, dtype: str, batch: int = 1, **changes) -> measure.Step:
    return measure.Step(ETRIS, measure.make(ETRIS, arm, preset, **changes), batch, dtype)


@pytest.mark.parametrize("preset", COUNTED)
def test_as_released_it_keeps_what_was_counted(preset):
    """A CPU keeps dropout's mask in the tensor's dtype, and so it was counted; a GPU keeps a byte for each element."""
    step = a_step("release", preset, "float32", parity="released")
    with mock.patch.object(meta, "_dropout", F.dropout):
        saved = step.saved()
    found = {name: saved[name] / MIB for name in COUNTED[preset]}
    if preset == "r101":  # 37.4: where another 3.6 MiB were kept is not known
        assert found.pop("HA") == pytest.approx(COUNTED[preset]["HA"], rel=0.1)
    assert found == pytest.approx({name: COUNTED[preset][name] for name in found}, rel=0.05)
    assert saved.total() / MIB == pytest.approx(TOTAL[preset], rel=0.012)
    on_a_gpu = step.saved().total() / MIB
    assert on_a_gpu == pytest.approx({"vit-b": 652.9, "r101": 579.8}[preset], rel=0.001)


def test_as_released_it_computes_what_was_counted():
    released = a_step("release", "vit-b", "float32", parity="released").flops(H200)
    frozen = a_step("release", "vit-b", "float32", parity="dead_parameters").flops(H200)
    resnet = a_step("release", "r101", "float32", parity="released").flops(H200)
    per_sample = [[count / 1e9 for count in flops] for flops in (released, frozen, resnet)]
    assert per_sample[0][0] - ATTENTION == pytest.approx(180.3, rel=0.002)
    # of attention's backward, 2.5 times the forward, all blocks take part, or the last eight
    assert sum(per_sample[0]) - 3.5 * ATTENTION == pytest.approx(422.5, rel=0.002)
    assert sum(per_sample[1]) - (1 + 2.5 * 8 / 12) * ATTENTION == pytest.approx(383.7, rel=0.002)
    assert per_sample[2][0] == pytest.approx(133.6, rel=0.005) and sum(per_sample[2]) == pytest.approx(315.2, rel=0.005)


def test_without_maps_it_keeps_what_was_estimated():
    """330 to 380 MiB in float32 with frozen positions and all that can be avoided; strong avoids the maps and the dead work."""
    strong, ours = (a_step(arm, "vit-b", "float32", batch=16).saved().total() / 16 / MIB for arm in ("strong", "fastadapt"))
    assert ours < 330 < strong


def test_here_it_keeps_at_most_190_mib_a_sample():
    saved = a_step("fastadapt", "vit-b", "bfloat16", batch=16).saved()
    assert saved.total() / 16 / MIB < 185
    again = a_step("fastadapt", "vit-b", "bfloat16", batch=16, recompute=True).saved()
    assert again.total() / 16 / MIB < 110
