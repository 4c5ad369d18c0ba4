"""Summaries of raw samples. Owns the statistics, not what is compared with what.

The bootstrap interval of a median is computed, not simulated: no random number is in a report, so that it renders to
the same bytes with every numpy, and 10,000 cells take a tenth of a second.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
NORMAL_FROM = 2000
"""From so many samples on the binomial's quantile is taken from its normal limit: it is a rank off at most."""
BATCH_ELEMENTS = 1 << 21
"""Most samples in one table, fill included."""


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the greatest of some ratios."""

    low: float
    high: float
    count: int

    @classmethod
    def of(cls, ratios: Iterable[float | None]) -> Range | None:
        """Of those that exist; None where none does."""
        known = [ratio for ratio in ratios if ratio is not None]
        return cls(min(known), max(known), len(known)) if known else None


@dataclass(frozen=True, slots=True)
class Summary:
    """A sample set in the order statistics that a report prints; seconds in, seconds out."""

    n: int
    median: float
    ci_low: float
    ci_high: float
    """Bootstrap interval of the median at 95 %, see `interval_rank`; equal to the median when there is one sample."""
    mean: float
    p10: float
    p90: float
    p99: float

    @property
    def spread(self) -> float:
        """(p90 − p10) / median."""
        return (self.p90 - self.p10) / self.median


def summarize(sample_sets: Sequence[Sequence[float]]) -> list[Summary]:
    """A summary of each sample set, in order. Quantiles between two samples are interpolated linearly.

    Raises ValueError on an empty set: a missing measurement has no summary.
    """
    if any(len(samples) == 0 for samples in sample_sets):
        raise ValueError("a sample set is empty")
    summaries: dict[int, Summary] = {}
    for members in _batches([len(samples) for samples in sample_sets]):
        for i, summary in zip(members, _summarize([sample_sets[i] for i in members]), strict=True):
            summaries[i] = summary
    return [summaries[i] for i in range(len(sample_sets))]


@lru_cache(maxsize=4096)
def interval_rank(n: int) -> int:
    """The k for which the k-th smallest and the k-th largest of n samples are the interval of their median at 95 %.

    The percentile bootstrap, without the simulation: the median of a resample of n is at most the k-th smallest sample
    with probability P(Binomial(n, k/n) ≥ n/2), at most, and k is the least at which that reaches 2.5 %
    (Efron, "Bootstrap methods: another look at the jackknife", 1979, section 3). Up to five samples k is 1: the
    interval is their range.
    """
    if n >= NORMAL_FROM:
        return math.floor((n - 1.959963985 * math.sqrt(n)) / 2)
    needed = (n + 1) // 2
    ranks = range(1, n + 1)
    return ranks[bisect_left(ranks, (1 - CONFIDENCE) / 2, key=lambda k: _binomial_tail(n, k / n, needed))]


def _binomial_tail(n: int, p: float, least: int) -> float:
    """P(Binomial(n, p) ≥ least), by logarithms, since n over j passes the largest float."""
    if p >= 1.0:
        return 1.0
    log_n = math.lgamma(n + 1)
    return sum(
        math.exp(log_n - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * math.log(p) + (n - j) * math.log1p(-p))
        for j in range(least, n + 1)
    )


def geometric_mean(ratios: Sequence[float]) -> float:
    """Geometric mean of positive ratios. Raises ValueError on an empty sequence."""
    if not ratios:
        raise ValueError("no ratios")
    return float(np.exp(np.mean(np.log(ratios))))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of sets, those of similar length together, so that a filled table stays small."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > BATCH_ELEMENTS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _summarize(sample_sets: Sequence[Sequence[float]]) -> Iterator[Summary]:
    counts = np.asarray([len(samples) for samples in sample_sets])
    flat = np.concatenate([np.asarray(samples, dtype=np.float64) for samples in sample_sets])
    means = np.add.reduceat(flat, np.concatenate([[0], np.cumsum(counts)[:-1]])) / counts
    # rows are filled up with infinities, which sort behind every sample
    table = np.full((len(sample_sets), counts.max()), np.inf)
    table[np.arange(counts.max()) < counts[:, None]] = flat
    table.sort(axis=1)
    rows = np.arange(len(sample_sets))
    ranks = np.asarray([interval_rank(int(n)) for n in counts])
    low, high = table[rows, ranks - 1], table[rows, counts - ranks]
    p10, median, p90, p99 = (_quantile(table, rows, counts, fraction) for fraction in (0.1, 0.5, 0.9, 0.99))
    for row in range(len(sample_sets)):
        yield Summary(
            int(counts[row]),
            float(median[row]),
            float(low[row]),
            float(high[row]),
            float(means[row]),
            float(p10[row]),
            float(p90[row]),
            float(p99[row]),
        )


def _quantile(table: np.ndarray, rows: np.ndarray, counts: np.ndarray, fraction: float) -> np.ndarray:
    """A quantile of each sorted row, [rows]."""
    position = (counts - 1) * fraction
    below = np.floor(position).astype(np.intp)
    above = np.minimum(below + 1, counts - 1)
    lower, upper = table[rows, below], table[rows, above]
    return np.asarray(lower + (upper - lower) * (position - below))
