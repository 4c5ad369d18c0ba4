"""What each chunk of a prompt costs a kernel that dequantizes: a straight line through times over the number of chunks.

Owns the fit. vLLM's Exllama kernel (csrc/quantization/gptq/q_gemm.cu) dequantizes the whole weight to float16 and calls
cuBLAS when it is given more than 50 rows, and multiplies from the packed weight up to 50. So T = T0 + chunks * t while
chunks are larger than that, and another kernel runs below.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smbench.document_gptq_cells import EXLLAMA
from smbench.document_gptq_numbers import Interval

DEQUANTIZES_ABOVE_ROWS: Mapping[str, int] = {EXLLAMA: 50}
"""Linear kernel to the rows up to which it multiplies from the packed weight: MAX_Q_GEMM_ROWS in vLLM's q_gemm.cuh."""

FLOAT16_BYTES = 2
LEAST_POINTS = 3
"""Fewer chunk sizes than this are on some line always."""

_T_975 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    15: 2.131,
    20: 2.086,
    30: 2.042,
    60: 2.000,
}
"""Degrees of freedom to the 97.5 % quantile of Student's distribution; between two, the one of fewer is taken."""


@dataclass(frozen=True, slots=True)
class Point:
    """A time at a chunk size."""

    chunk: int
    chunks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """T = T0 + chunks * per_chunk, by least squares, with its intervals at 95 %."""

    name: str
    """Whose times: a provider's title, or a published card."""
    limit_rows: int
    """Up to so many rows another kernel runs."""
    fitted: Sequence[Point]
    switched: Sequence[Point]
    """Points of the other kernel: the line is not for them."""
    start: Interval
    per_chunk: Interval
    residual: float
    """Largest distance of a fitted point from the line, relative to the point."""
    traffic_s: float | None = None
    """What dequantizing all weights once moves, at the card's bandwidth; None where model or card are unknown."""

    def at(self, chunks: int) -> float:
        """Seconds on the line."""
        return self.start.value + chunks * self.per_chunk.value


def dequantizing_bytes(packed_bytes: float, parameters: float) -> float:
    """What dequantizing all linear weights once moves: packed ones read, float16 ones written, and read by cuBLAS."""
    return packed_bytes + 2 * FLOAT16_BYTES * parameters


def fit(
    name: str, limit_rows: int, input_len: int, times: Mapping[int, float], traffic_s: float | None = None
) -> Fit | None:
    """The line through times by chunk size; None where fewer than three chunk sizes exceed the limit."""
    points = [Point(chunk, -(-input_len // chunk), seconds) for chunk, seconds in sorted(times.items(), reverse=True)]
    fitted = [point for point in points if point.chunk > limit_rows]
    if len(fitted) < LEAST_POINTS or len({point.chunks for point in fitted}) < LEAST_POINTS:
        return None
    start, per_chunk = _line(fitted)
    residual = max(
        abs(point.seconds - start.value - per_chunk.value * point.chunks) / point.seconds for point in fitted
    )
    switched = [point for point in points if point.chunk <= limit_rows]
    return Fit(name, limit_rows, fitted, switched, start, per_chunk, residual, traffic_s)


def _line(points: Sequence[Point]) -> tuple[Interval, Interval]:
    """Intercept and slope by ordinary least squares, their intervals by Student's distribution."""
    n = len(points)
    mean_x = sum(point.chunks for point in points) / n
    mean_y = sum(point.seconds for point in points) / n
    spread = sum((point.chunks - mean_x) ** 2 for point in points)
    slope = sum((point.chunks - mean_x) * (point.seconds - mean_y) for point in points) / spread
    start = mean_y - slope * mean_x
    squares = sum((point.seconds - start - slope * point.chunks) ** 2 for point in points)
    deviation = math.sqrt(squares / (n - 2))
    known = sorted(_T_975)
    reach = _T_975[known[bisect_right(known, n - 2) - 1]] * deviation
    slope_reach = reach / math.sqrt(spread)
    start_reach = reach * math.sqrt(1 / n + mean_x**2 / spread)
    return (
        Interval(start, start - start_reach, start + start_reach),
        Interval(slope, slope - slope_reach, slope + slope_reach),
    )
