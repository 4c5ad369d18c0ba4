"""Ratios of times with their intervals, and how far noise alone moves them: arrays in, arrays out.

Owns the arithmetic on samples. Does not own which numbers may be compared, nor what a ratio is called (`compare`).
Everything here is in natural logarithms of ratios, so that twice as slow and twice as fast are equally far from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from smbench.stats import CONFIDENCE

RESAMPLES = 999
BLOCK = 512
"""Cells that are resampled at once."""
MAD_TO_SD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
IQR_TO_SD = 1 / 1.349
"""Standard deviation of a normal distribution over its interquartile range."""
LEAST_RESIDUALS = 8
"""Fewer residuals than this give no estimate of a spread."""

Runs = Sequence[Sequence[float]]
"""The samples of one way of timing one cell, for each run of a side."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """A row for each pair of numbers."""

    ratio: np.ndarray
    """Log of the second side's time over the first's: of medians, or of their geometric means over the runs."""
    low: np.ndarray
    high: np.ndarray
    """Percentile-bootstrap interval at 95 %."""


def centre(runs: Runs) -> float:
    """A side's number: the median of its samples; of several runs, the geometric mean of their medians."""
    return math.exp(sum(map(_log_median, runs)) / len(runs))


def intervals(a: Sequence[Runs], b: Sequence[Runs]) -> Intervals:
    """Ratio and interval for each pair of sides.

    A side with one run is resampled over its samples; a side with several over its runs, the highest level at which
    times vary at random (Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM 2013, section 6).
    """
    blocks = []
    tail = 50 * (1 - CONFIDENCE)
    # in blocks, so that memory does not grow with the number of cells
    for start in range(0, len(a), BLOCK):
        own, other = (_resampled(side[start : start + BLOCK], seed) for seed, side in enumerate((a, b)))
        blocks.append(np.percentile(other - own, [tail, 100 - tail], axis=1))
    low, high = np.concatenate(blocks, axis=1) if blocks else np.zeros((2, 0))
    ratio = np.log([centre(runs) for runs in b]) - np.log([centre(runs) for runs in a])
    return Intervals(ratio, np.minimum(low, ratio), np.maximum(high, ratio))


def scatter(runs: Runs) -> float:
    """Standard deviation of a side's log number if each run counted as one draw from the spread of its samples.

    Samples of one run share clocks, memory addresses and neighbours, so more of them do not make it more certain how
    the next run will turn out. From the interquartile range, which rare interruptions do not move.
    """
    variances = []
    for samples in runs:
        ordered = sorted(samples)
        variances.append((math.log(_quantile(ordered, 0.75) / _quantile(ordered, 0.25)) * IQR_TO_SD) ** 2)
    return math.sqrt(sum(variances)) / len(runs)


def between_runs(sides: Iterable[Sequence[Runs]]) -> float | None:
    """Standard deviation of a log median between repeated runs, over all cells of the sides; None without repeats.

    From the median absolute deviation, so that a few cells that went wrong in one run do not decide.
    """
    residuals: list[float] = []
    for runs in (runs for side in sides for runs in side if len(runs) > 1):
        medians = np.asarray([_log_median(samples) for samples in runs])
        residuals.extend((medians - medians.mean()) * np.sqrt(len(runs) / (len(runs) - 1)))
    return _sd(residuals)


def roughness(lines: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation of the noise in log ratios, from how they jump between neighbours along an axis.

    What differs between two versions of a program changes smoothly from one size to the next, noise does not: each
    value is held against the mean of its two neighbours (Gasser, Sroka and Jennen-Steinmetz, Biometrika 73, 1986).
    None where there are too few neighbours.
    """
    residuals: list[float] = []
    for line in lines:
        values = np.asarray(line)
        if len(values) > 2:
            residuals.extend((values[1:-1] - (values[:-2] + values[2:]) / 2) / np.sqrt(1.5))
    return _sd(residuals)


def _log_median(samples: Sequence[float]) -> float:
    return math.log(_quantile(sorted(samples), 0.5))


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    """Between two samples interpolated linearly. Without numpy, which is slow for a few numbers at a time."""
    below, share = divmod((len(ordered) - 1) * fraction, 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + (high - low) * share


def _sd(residuals: Sequence[float]) -> float | None:
    """Standard deviation of values around zero, from the median of their sizes."""
    return float(MAD_TO_SD * np.median(np.abs(residuals))) if len(residuals) >= LEAST_RESIDUALS else None


def _resampled(side: Sequence[Runs], seed: int) -> np.ndarray:
    """Log numbers of RESAMPLES resamples of each cell, [cells, RESAMPLES]; cells of like size share their draws."""
    drawn = np.empty((len(side), RESAMPLES))
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, runs in enumerate(side):
        shapes.setdefault((len(runs), len(runs[0]) if len(runs) == 1 else 0), []).append(i)
    for (count, _), members in shapes.items():
        if count == 1:
            drawn[members] = np.log(resampled_medians(np.asarray([side[i][0] for i in members]), seed))
        else:
            medians = np.asarray([[_log_median(samples) for samples in side[i]] for i in members])
            drawn[members] = _resampled_means(medians, seed)
    return drawn


def resampled_medians(table: np.ndarray, seed: int) -> np.ndarray:
    """Medians of RESAMPLES bootstrap resamples of each row of [rows, n]: [rows, RESAMPLES], all rows by the same draws.

    No resample is drawn. The k-th smallest of n draws from sorted samples x is x[floor(n U)], with U the k-th smallest
    of n uniform numbers (Efron, The Annals of Statistics 7, 1979, section 3), and that has a Beta distribution.
    """
    n = table.shape[1]
    rng = np.random.default_rng([seed, n])
    ordered = np.sort(table, axis=1)
    half = (n + 1) // 2
    lower = rng.beta(half, n - half + 1, RESAMPLES)
    # the next smallest uniform number, for the two middle draws of an even n
    upper = lower if n % 2 else lower + (1 - lower) * rng.beta(1, n - half, RESAMPLES)
    at = [np.minimum((uniform * n).astype(np.intp), n - 1) for uniform in (lower, upper)]
    return np.asarray((ordered[:, at[0]] + ordered[:, at[1]]) / 2)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    """Means of RESAMPLES resamples of each row of [rows, runs]."""
    runs = values.shape[1]
    chosen = np.random.default_rng([seed, runs]).integers(0, runs, (RESAMPLES, runs))
    return np.asarray(values[:, chosen].mean(axis=2))
