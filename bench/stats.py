"""Medians, and ratios that know how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile of n samples, in the samples' unit."""

    n: int
    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """median(a) / median(b) with a bootstrap interval; above 1, a takes longer."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Ratio:
        """The ratio of two counts, which have no spread."""
        return cls(value, value, value)

    @property
    def spread(self) -> float:
        """How far from 1 the interval reaches: the noise floor, when a and b are the same arm."""
        return max(abs(self.low - 1), abs(self.high - 1))

    def sign(self, noise: float = 0.0) -> str:
        """'<' or '>' 1, or '≈' where the interval touches 1 or the ratio is within `noise` of it."""
        if self.low <= 1 <= self.high or abs(self.value - 1) <= noise:
            return "≈"
        return "<" if self.value < 1 else ">"


def summary(samples: Sequence[float]) -> Summary:
    """The Summary of at least one sample."""
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    p20, median, p80 = np.quantile(np.asarray(samples, dtype=float), (0.2, 0.5, 0.8))
    return Summary(len(samples), float(median), float(p20), float(p80))


def ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Ratio:
    """The Ratio of two arms sampled in the same rounds (a[i] and b[i] belong to round i).

    Rounds are resampled whole, so what slows every arm of a round at once, a busy machine or a falling clock, cancels.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a, b: expected one sample each of the same rounds, got shapes {a.shape} and {b.shape}")
    rounds = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    resampled = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    low, high = np.quantile(resampled, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm of positive values: the average of ratios."""
    return float(np.exp(np.mean(np.log(values))))
