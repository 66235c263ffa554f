"""Ratios find what is there, and know when nothing is."""

from __future__ import annotations

import numpy as np
import pytest

from bench.stats import Ratio, geometric_mean, ratio, summary


def test_summary_is_the_quantiles() -> None:
    found = summary(range(1, 12))
    assert (found.n, found.median, found.p20, found.p80) == (11, 6.0, 3.0, 9.0)


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="samples: expected at least one"):
        summary([])


def test_ratio_finds_a_difference() -> None:
    rng = np.random.default_rng(0)
    b = 1 + 0.05 * rng.random(40)
    found = ratio(0.8 * b[::-1], b)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(0.8, rel=0.02)
    assert found.sign() == "<"


def test_a_slow_round_cancels() -> None:
    """A machine that is busy for half of the rounds slows both arms of those rounds."""
    rng = np.random.default_rng(1)
    busy = np.where(rng.random(30) < 0.5, 3.0, 1.0)
    paired = ratio(0.9 * busy, busy)
    assert paired.value == pytest.approx(0.9)
    assert paired.high - paired.low < 1e-9


def test_equal_arms_are_equal() -> None:
    rng = np.random.default_rng(2)
    a, b = 1 + 0.1 * rng.random((2, 50))
    assert ratio(a, b).sign() == "≈"


def test_inside_the_noise_floor_is_equal() -> None:
    found = Ratio(0.97, 0.96, 0.98)
    assert found.sign() == "<"
    assert found.sign(noise=0.05) == "≈"
    assert Ratio(1.2, 1.1, 1.3).sign(noise=0.05) == ">"


def test_spread_is_the_farther_end() -> None:
    assert Ratio(1.0, 0.93, 1.02).spread == pytest.approx(0.07)


def test_the_interval_covers_the_truth() -> None:
    """Of a hundred intervals at 95 %, nearly all hold the ratio of the medians that the samples were drawn with."""
    rng = np.random.default_rng(3)
    draws = [ratio(0.8 * rng.lognormal(0, 0.1, 25), rng.lognormal(0, 0.1, 25), seed) for seed in range(100)]
    assert sum(found.low <= 0.8 <= found.high for found in draws) >= 88


def test_arms_of_different_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"same rounds, got shapes \(3,\) and \(2,\)"):
        ratio([1, 2, 3], [1, 2])


def test_counts_have_no_spread() -> None:
    assert Ratio.exact(0.5).sign() == "<"
    assert Ratio.exact(1.0).sign() == "≈"
    assert Ratio.exact(1.5).sign() == ">"


def test_geometric_mean_of_reciprocals_is_one() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
