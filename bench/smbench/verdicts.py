"""From two comparable numbers to a verdict: faster, slower, same or unclear. Pure; owns the rule and its limits.

Does not own which numbers are comparable (`compare`), nor the arithmetic on samples (`ratios`). How often the rule is
wrong, measured and simulated, is in FORMAT.md under compare.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smbench import ratios
from smbench.cell import AxisValue, Cell
from smbench.metrics import METRICS
from smbench.stats import geometric_mean

Verdict = Literal["faster", "slower", "same", "unclear"]

VERDICTS: tuple[Verdict, ...] = ("slower", "faster", "same", "unclear")
MARGIN = 0.02
"""Differences up to this are of no interest."""
SAME_FACTOR = 2.5
"""An interval that reaches farther than so many margins is not called the same."""
NOISE_LIMIT_FACTOR = 5.0
"""Nor is anything where noise explains more than so many margins: it could hide as much."""
SCATTER_FACTOR = 2.0
"""Standard deviations of single samples that a difference between two runs must exceed."""
NOISE_FACTOR = 3.0
"""Standard deviations of the noise between runs that a difference must exceed."""
LOADS = frozenset({"online"})
"""Workloads whose samples are the requests of one load: they differ because the load does, not because of noise."""
SHIFT_SHARE = 0.8
"""So large a share of cells with one verdict, slower or faster, is reported as a shift."""
SHIFT_CELLS = 8
"""Fewer cells than this cannot show one."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Every number of one way of timing one cell on one side, in the unit of its metric."""

    metric: str
    method: str
    l2: str
    runs: tuple[tuple[float, ...], ...]
    """The samples of each run; a published number is one run of one sample."""
    definition: str = ""
    """What the metric counts, see `metrics`; empty where it is what our numbers count."""
    stated: bool = False
    """A figure that stands for samples which nobody has, or that a run has one of only."""

    @property
    def judgeable(self) -> bool:
        """Whether anything says how far the number would move: samples, or repeats of the run."""
        return not self.stated or len(self.runs) > 1


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one measurement of one cell."""

    cell: Cell
    measurement: str
    metric: str
    verdict: Verdict
    ratio: float
    """Time of B over time of A; of a metric where higher is better, A over B: above 1, B is slower."""
    ci_low: float | None
    """None, as the other end, where a side has a stated figure alone: there is no interval then, and no verdict."""
    ci_high: float | None
    tolerance: float
    """Relative difference up to which noise or the margin explains the ratio."""
    a: float
    b: float
    """Each side's median, or the geometric mean of its runs' medians, in the unit of the metric."""
    runs_a: int
    runs_b: int
    samples_a: int
    samples_b: int

    @property
    def basis(self) -> str:
        """What the interval was resampled over, on either side."""
        if self.ci_low is None:
            return "stated figures"
        a, b = ("restarts" if runs > 1 else "samples" for runs in (self.runs_a, self.runs_b))
        return a if a == b else f"{a} of A, {b} of B"


@dataclass(frozen=True, slots=True)
class Noise:
    """How far numbers of one measurement move between runs of the same thing."""

    measurement: str
    source: Literal["restarts", "neighbours", "unknown"]
    sd: float | None
    """Relative standard deviation of one run's number; None where it is unknown."""


@dataclass(frozen=True, slots=True)
class Shift:
    """Almost all cells moved one way on the same kind of device, which is rarely what a change of a program does."""

    measurement: str
    verdict: Verdict
    cells: int
    of: int
    geomean_ratio: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two comparable numbers."""

    cell: Cell
    measurement: str
    a: Timing
    b: Timing


def noise_between(pairs: Sequence[Pair], same_devices: bool) -> list[Noise]:
    """What is known of the noise between runs: from repeats; else, between alike devices, from neighbouring cells."""
    found = []
    for name in dict.fromkeys(pair.measurement for pair in pairs):
        members = [pair for pair in pairs if pair.measurement == name]
        repeats = ratios.between_runs([[pair.a.runs for pair in members], [pair.b.runs for pair in members]])
        if repeats is not None:
            found.append(Noise(name, "restarts", repeats))
            continue
        rough = ratios.roughness(_lines(members)) if same_devices else None
        # a ratio has the noise of two runs
        found.append(
            Noise(name, "neighbours", rough / math.sqrt(2)) if rough is not None else Noise(name, "unknown", None)
        )
    return found


def _lines(pairs: Sequence[Pair]) -> list[list[float]]:
    """Log ratios along the longest axis of each operation and provider, all other axes being equal."""
    families: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        families.setdefault((pair.cell.subject, pair.cell.provider), []).append(pair)
    lines: list[list[float]] = []
    for members in families.values():
        axis = _longest_axis([pair.cell for pair in members])
        grouped: dict[tuple[tuple[str, AxisValue], ...], list[tuple[int, float]]] = {}
        for pair in members:
            at = pair.cell.axes.get(axis) if axis else None
            if isinstance(at, int):
                rest = tuple(sorted((name, value) for name, value in pair.cell.axes.items() if name != axis))
                ratio = math.log(ratios.centre(pair.b.runs) / ratios.centre(pair.a.runs))
                grouped.setdefault(rest, []).append((at, ratio))
        lines += [[ratio for _, ratio in sorted(line)] for line in grouped.values()]
    return lines


def _longest_axis(cells: Sequence[Cell]) -> str | None:
    """The axis of integers that takes most values."""
    values: dict[str, set[AxisValue]] = {}
    for cell in cells:
        for name, value in cell.axes.items():
            if isinstance(value, int):
                values.setdefault(name, set()).add(value)
    return max(values, key=lambda name: len(values[name]), default=None)


def rows_of(pairs: Sequence[Pair], noise: Mapping[str, Noise], margin: float) -> list[Row]:
    lower = [METRICS[pair.a.metric].better == "lower" for pair in pairs]
    firsts = [pair.a.runs if low else pair.b.runs for pair, low in zip(pairs, lower, strict=True)]
    seconds = [pair.b.runs if low else pair.a.runs for pair, low in zip(pairs, lower, strict=True)]
    found = ratios.intervals(firsts, seconds)
    rows = []
    for i, pair in enumerate(pairs):
        runs = len(pair.a.runs), len(pair.b.runs)
        sd = noise[pair.measurement].sd or 0.0
        floor = max(
            SCATTER_FACTOR * _scatter(pair),
            NOISE_FACTOR * sd * math.sqrt(1 / runs[0] + 1 / runs[1]),
        )
        low, high = float(found.low[i]), float(found.high[i])
        verdict, tolerance = judge(float(found.ratio[i]), low, high, floor, margin)
        judgeable = all(side.judgeable and not _single(pair, side) for side in (pair.a, pair.b))
        rows.append(
            Row(
                pair.cell,
                pair.measurement,
                pair.a.metric,
                verdict if judgeable else "unclear",
                math.exp(found.ratio[i]),
                math.exp(low) if judgeable else None,
                math.exp(high) if judgeable else None,
                math.expm1(tolerance),
                ratios.centre(pair.a.runs),
                ratios.centre(pair.b.runs),
                *runs,
                sum(len(samples) for samples in pair.a.runs),
                sum(len(samples) for samples in pair.b.runs),
            )
        )
    return rows


def _scatter(pair: Pair) -> float:
    """Standard deviation of a log ratio if every run counted as one of its samples.

    Repeats of a load say better how far its numbers move than its requests do, which no run draws at random.
    """
    if pair.cell.subject in LOADS and len(pair.a.runs) > 1 and len(pair.b.runs) > 1:
        return 0.0
    return math.hypot(ratios.scatter(pair.a.runs), ratios.scatter(pair.b.runs))


def _single(pair: Pair, side: Timing) -> bool:
    """Whether a side is one number of one load, such as its duration: nothing says how far it would move."""
    return pair.cell.subject in LOADS and sum(map(len, side.runs)) == 1


def judge(ratio: float, low: float, high: float, floor: float, margin: float) -> tuple[Verdict, float]:
    """The verdict on a log ratio with its interval, and the tolerance that it is held against, a log ratio too.

    The tolerance is the margin, or what noise explains (`floor`) where that is more. An interval wholly beyond it is
    slower or faster. A ratio within it is the same, if neither the interval nor the noise leave room for a difference
    that matters.
    """
    tolerance = max(math.log1p(margin), floor)
    if low > tolerance:
        return "slower", tolerance
    if high < -tolerance:
        return "faster", tolerance
    bounded = max(-low, high) <= math.log1p(SAME_FACTOR * margin)
    quiet = tolerance <= math.log1p(NOISE_LIMIT_FACTOR * margin)
    return ("same" if bounded and quiet and abs(ratio) <= tolerance else "unclear"), tolerance


def shifts_of(rows: Sequence[Row]) -> list[Shift]:
    """Measurements of which almost all cells have one verdict, slower or faster."""
    found = []
    for name in dict.fromkeys(row.measurement for row in rows):
        members = [row for row in rows if row.measurement == name]
        for verdict in VERDICTS[:2]:
            cells = sum(row.verdict == verdict for row in members)
            if len(members) >= SHIFT_CELLS and cells >= SHIFT_SHARE * len(members):
                mean = geometric_mean([row.ratio for row in members])
                found.append(Shift(name, verdict, cells, len(members), mean))
    return found
