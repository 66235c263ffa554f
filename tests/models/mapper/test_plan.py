"""What a plan counts of MaPPER, against what was counted of the released code."""

from __future__ import annotations

import pytest

from fastadapt.models.mapper.method import METHOD
from fastadapt.models.plan import measure
from fastadapt.models.plan.gpus import gpu

GIB = 2**30


def a_step(arm: str, **changes) -> measure.Step:
    return measure.Step(METHOD, measure.make(METHOD, arm, **changes), METHOD.batch, "bfloat16")


def test_the_release_needs_what_was_counted_of_its_code():
    step = a_step("release", parity="released")
    saved = step.saved()
    expected = {
        "LoCA": 0.48,
        "DyPA": 0.017,
        "image tower, attention": 33.72,
        "fusion self-attention": 20.27,
        "fusion encoder, the rest": 3.32,
    }
    assert {name: saved[name] / GIB for name in expected} == pytest.approx(expected, rel=0.015)
    assert saved["LoCA"] / 3 / 2**20 == pytest.approx(164.5, rel=0.01)
    assert saved.total() / GIB == pytest.approx(62.3, rel=0.005)
    forward, backward = step.flops(gpu("H200"))
    assert forward / 32e9 == pytest.approx(346.8, rel=0.001) and backward / 32e9 == pytest.approx(326.4, rel=0.001)


def test_without_maps_it_needs_what_was_counted():
    assert a_step("strong").saved().total() / GIB == pytest.approx(11.3, rel=0.01)


def test_here_it_keeps_at_most_100_mib_a_sample():
    step = a_step("fastadapt")
    saved = step.saved()
    assert saved.total() / 2**20 / 32 < 90
    # of every LoCA its input and two numbers a channel
    assert saved["LoCA"] == pytest.approx(3 * 32 * 1370 * 768 * 2, rel=0.001)
    assert [flops / 32e9 for flops in step.flops(gpu("H200"))] == pytest.approx([341.5, 454.2], rel=0.001)


def test_without_recomputing_it_keeps_less_than_without_maps():
    assert a_step("fastadapt", recompute=False).saved().total() / 2**20 / 32 == pytest.approx(234, rel=0.01)
