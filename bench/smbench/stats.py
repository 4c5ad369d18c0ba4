"""Summaries of raw samples. Owns the statistics, not what is compared with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 999
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Summary:
    """A sample set in the order statistics that a report prints; seconds in, seconds out."""

    n: int
    median: float
    ci_low: float
    ci_high: float
    """Percentile-bootstrap interval of the median at 95 %; equal to the median when there is one sample."""
    mean: float
    p10: float
    p90: float

    @property
    def spread(self) -> float:
        """(p90 − p10) / median."""
        return (self.p90 - self.p10) / self.median


def summarize(sample_sets: Sequence[Sequence[float]]) -> list[Summary]:
    """A summary of each sample set, in order. Sets of equal length are resampled together, from a fixed seed.

    Raises ValueError on an empty set: a missing measurement has no summary.
    """
    if any(len(samples) == 0 for samples in sample_sets):
        raise ValueError("a sample set is empty")
    summaries: dict[int, Summary] = {}
    for length in sorted({len(samples) for samples in sample_sets}):
        members = [i for i, samples in enumerate(sample_sets) if len(samples) == length]
        table = np.asarray([sample_sets[i] for i in members], dtype=np.float64)
        low, high = _median_interval(table)
        quantiles = np.percentile(table, [10, 50, 90], axis=1)
        for row, i in enumerate(members):
            p10, median, p90 = (float(q) for q in quantiles[:, row])
            # interpolating between equal samples can miss them by a rounding, and no error bar may be negative
            ci_low, ci_high = min(float(low[row]), median), max(float(high[row]), median)
            summaries[i] = Summary(length, median, ci_low, ci_high, float(table[row].mean()), p10, p90)
    return [summaries[i] for i in range(len(sample_sets))]


def _median_interval(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interval of each row's median, [rows] and [rows]."""
    if table.shape[1] == 1:
        return table[:, 0], table[:, 0]
    interval = bootstrap(
        (table,),
        np.median,
        axis=1,
        n_resamples=RESAMPLES,
        batch=32,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return interval.low, interval.high


def geometric_mean(ratios: Sequence[float]) -> float:
    """Geometric mean of positive ratios. Raises ValueError on an empty sequence."""
    if not ratios:
        raise ValueError("no ratios")
    return float(np.exp(np.mean(np.log(ratios))))
