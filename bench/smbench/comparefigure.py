"""The figure of a comparison: every ratio with its interval, sorted. Owns its looks; computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes as Panel
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from smbench.compare import Comparison
from smbench.figures import DPI, STYLE, WIDTH_PX, drawable
from smbench.verdicts import VERDICTS, Row, Verdict

COLORS: Mapping[Verdict, str] = {"slower": "#b2182b", "faster": "#2166ac", "same": "#4d9a57", "unclear": "#999999"}
LEAST_SPAN = 1.15
"""The ratio axis spans at least this factor either way, so that noise does not look like an effect."""
FINE = (1.05, 1.1, 1.25, 1.5, 2, 3, 5)
TICKS = sorted(
    {1.0, *(side for tick in (*FINE, *(10.0**k for k in range(1, 7))) for side in (tick, round(1 / tick, 6)))}
)
LEAST_TICK_SHARE = 0.09
"""Ticks of the ratio axis are at least this share of it apart."""


def draw(comparisons: Sequence[Comparison]) -> bytes:
    """The PNG: a panel for each comparison and measurement. The comparisons have at least one row together."""
    shown = [
        (letter, comparison, name, [row for row in comparison.rows if row.measurement == name])
        for letter, comparison in zip("BCDEFGHIJKLMNOPQRSTUVWXYZ", comparisons, strict=False)
        for name in comparison.measurements()
    ]
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH_PX / DPI, 2.9 * len(shown) + 0.5), dpi=DPI, layout="constrained")
        panels = list(figure.subplots(len(shown), 1, squeeze=False).flat)
        for panel, (letter, comparison, name, rows) in zip(panels, shown, strict=True):
            _ratios(panel, rows, comparison.margin)
            title = f"{name}: time of {letter} ({comparison.b.name}) over time of A ({comparison.a.name})"
            panel.set_title(drawable(title), loc="left")
        handles = [
            Line2D([], [], color=COLORS[verdict], marker="o", markersize=3, label=verdict) for verdict in VERDICTS
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(VERDICTS))
        FigureCanvasAgg(figure)
        file = BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def _ratios(panel: Panel, rows: Sequence[Row], margin: float) -> None:
    """Ratios of one measurement against their rank, in the colours of their verdicts; the margin is a grey band."""
    ranked = sorted(rows, key=lambda row: row.ratio)
    for verdict in VERDICTS:
        chosen = [(i + 1, row) for i, row in enumerate(ranked) if row.verdict == verdict]
        if not chosen:
            continue
        ranks = np.asarray([rank for rank, _ in chosen])
        # a stated figure has no interval: its point alone is drawn
        low, ratio, high = np.asarray(
            [[row.ci_low or row.ratio, row.ratio, row.ci_high or row.ratio] for _, row in chosen]
        ).T
        panel.vlines(ranks, low, high, color=COLORS[verdict], linewidth=0.8, alpha=0.6)
        size = 2.5 if len(ranked) > 300 else 4
        panel.plot(ranks, ratio, color=COLORS[verdict], linestyle="none", marker=".", markersize=size)
    panel.axhspan(1 / (1 + margin), 1 + margin, color="#cccccc", alpha=0.4, linewidth=0)
    panel.axhline(1, color="#444444", linewidth=0.8)
    below = max(LEAST_SPAN, 1.05 / ranked[0].ratio)
    above = max(LEAST_SPAN, 1.05 * ranked[-1].ratio)
    panel.set_yscale("log")
    panel.set_ylim(1 / below, above)
    apart = LEAST_TICK_SHARE * math.log(below * above)
    ticks: list[float] = []
    # from 1 outwards, so that 1 always has its tick
    for tick in sorted(TICKS, key=lambda tick: abs(math.log(tick))):
        if 1 / below <= tick <= above and all(abs(math.log(tick / other)) >= apart for other in ticks):
            ticks.append(tick)
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×" if value < 100 else f"{value:.0f}×"))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlim(0, len(ranked) + 1)
    panel.set_xlabel("cells, by ratio")
