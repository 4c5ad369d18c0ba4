"""What a request's time is made of: prefill, steps, rates, each with its interval. Values in, values out.

Owns the split of document 002's numbers into phases. Does not own which cells are split (`document_gptq_cells`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smbench.analysis import Row
from smbench.arch import Device
from smbench.document_gptq_cells import E2E, TPOT, TTFT, measurement
from smbench.stats import Summary
from smbench.verdicts import SCATTER_FACTOR

DECILES_TO_SD = 2.563
"""Distance of the 90 % quantile from the 10 % quantile of a normal distribution, in standard deviations."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its interval at 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Work over time."""

    per_s: float
    peak_per_s: float | None
    """Of the card, by its datasheet; None where it is unknown."""

    @property
    def fraction(self) -> float | None:
        """Of the peak."""
        return self.per_s / self.peak_per_s if self.peak_per_s else None


@dataclass(frozen=True, slots=True)
class Split:
    """The phases of two requests that differ in their output length only."""

    step: Interval
    """Seconds of one decode step: (T_long - T_short) / (output_long - output_short)."""
    prefill: Interval
    """Seconds up to the first token: T_short - (output_short - 1) * step."""


def interval_of(summary: Summary | None) -> Interval | None:
    """A median with its interval."""
    return Interval(summary.median, summary.ci_low, summary.ci_high) if summary else None


def split(short: Row, long: Row) -> Split | None:
    """The phases, from the medians of a short and a long request; None where one of them has no number.

    A prefill makes the first of the output tokens, so n of them are the prefill and n - 1 steps. The two medians are
    independent, so their intervals add in quadrature.
    """
    a, b = short.summary(E2E), long.summary(E2E)
    if a is None or b is None:
        return None
    tokens, further = int(short.cell.axes["output_len"]), int(long.cell.axes["output_len"])
    between = further - tokens
    step = Interval(
        (b.median - a.median) / between,
        (b.median - a.median - math.hypot(b.median - b.ci_low, a.ci_high - a.median)) / between,
        (b.median - a.median + math.hypot(b.ci_high - b.median, a.median - a.ci_low)) / between,
    )
    share = (tokens - 1) / between
    centre = (1 + share) * a.median - share * b.median
    prefill = Interval(
        centre,
        centre - math.hypot((1 + share) * (a.median - a.ci_low), share * (b.ci_high - b.median)),
        centre + math.hypot((1 + share) * (a.ci_high - a.median), share * (b.median - b.ci_low)),
    )
    return Split(step, prefill)


def decode_rate(row: Row, device: Device | None) -> Rate | None:
    """Least bytes of a step over the time per output token; None where either is unknown."""
    found, summary = measurement(row, TPOT), row.summary(TPOT)
    if found is None or found.work is None or summary is None:
        return None
    return Rate(found.work.bytes / summary.median, device.memory_bandwidth_bytes_per_s if device else None)


def prefill_rate(row: Row, device: Device | None) -> Rate | None:
    """Floating-point operations of a prefill over the time to the first token; None where either is unknown."""
    found, summary = measurement(row, TTFT), row.summary(TTFT)
    if found is None or found.work is None or summary is None:
        return None
    peak = device.tensor_peak_flops_per_s(str(row.cell.axes["dtype"])) if device else None
    return Rate(found.work.flops / summary.median, peak)


@dataclass(frozen=True, slots=True)
class LogRatio:
    """Logarithm of one time over another, or the mean of several such."""

    value: float
    low: float
    high: float
    """Interval at 95 %: those of the two medians in quadrature."""
    floor: float
    """What the scatter of single samples explains, as `verdicts` takes it."""

    @property
    def interval(self) -> Interval:
        """The ratio itself."""
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high))


def log_ratio(a: Summary, b: Summary) -> LogRatio:
    """The time of B over the time of A.

    From summaries alone, so that a report needs no samples and draws no random numbers (see `stats`).
    """
    value = math.log(b.median / a.median)
    down = math.hypot(math.log(b.median / b.ci_low), math.log(a.ci_high / a.median))
    up = math.hypot(math.log(b.ci_high / b.median), math.log(a.median / a.ci_low))
    scatter = math.hypot(*(math.log(summary.p90 / summary.p10) / DECILES_TO_SD for summary in (a, b)))
    return LogRatio(value, value - down, value + up, SCATTER_FACTOR * scatter)


def mean_ratio(ratios: Sequence[LogRatio]) -> LogRatio:
    """The geometric mean of ratios at several points, whose intervals are independent. ValueError for none."""
    if not ratios:
        raise ValueError("no ratios")
    n = len(ratios)
    value = sum(ratio.value for ratio in ratios) / n
    return LogRatio(
        value,
        value - math.hypot(*(ratio.value - ratio.low for ratio in ratios)) / n,
        value + math.hypot(*(ratio.high - ratio.value for ratio in ratios)) / n,
        math.hypot(*(ratio.floor for ratio in ratios)) / n,
    )
