"""The figure of the report on tuned peers: a ratio for every point. Owns what it shows and where; computes nothing."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from smbench.analysis import Row
from smbench.document_lora_defects import integer
from smbench.document_lora_peers import Peers, Verdict, tokens
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.views import Plot

PANELS_ACROSS = 3
PANEL_HEIGHT = 2.7
TICKS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
RANKS = {8: "#9ecae1", 16: "#4292c6", 24: "#fdae6b", 32: "#2171b5", 48: "#e6550d", 64: "#08306b"}
OTHER_RANK = "#777777"
SPREAD = 0.055
"""Half the width, in powers of two, over which points with equally many tokens are laid side by side."""


def draw(plot: Plot, peers: Peers) -> bytes:
    """The PNG of the planned figure."""
    return png(lambda: _figure(plot, peers))


def _figure(plot: Plot, peers: Peers) -> Figure:
    """A panel for each family: the ratio at every point against the tokens of its batch."""
    verdicts = [verdict for verdict in peers.verdicts if verdict.overall]
    down = math.ceil(len(verdicts) / PANELS_ACROSS)
    figure = Figure(figsize=(WIDTH_PX / DPI, PANEL_HEIGHT * down + 0.9), dpi=DPI, layout="constrained")
    ours = peers.view.title(peers.ours or "")
    figure.suptitle(
        drawable(f"Time of the fastest tuned peer over time of {ours}, every point\n{plot.measure.title}"), fontsize=10
    )
    panels: list[Panel] = list(figure.subplots(down, PANELS_ACROSS, sharey=True, squeeze=False).flat)
    seen: set[int] = set()
    for panel, verdict in zip(panels, verdicts, strict=False):
        seen |= _panel(panel, peers, verdict, plot.measure.name)
    for panel in panels[len(verdicts) :]:
        panel.set_visible(False)
    low, high = (math.log2(limit) for limit in panels[0].get_ylim())
    panels[0].yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= math.log2(tick) <= high]))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    panels[0].yaxis.set_minor_locator(NullLocator())
    marks = [
        Line2D([], [], color=RANKS.get(rank, OTHER_RANK), marker="o", linestyle="none", label=f"rank {rank}")
        for rank in sorted(seen)
    ]
    marks += [
        Line2D([], [], color="#555555", marker="o", fillstyle="none", linestyle="none", label="intervals overlap"),
        Line2D([], [], color="#d62728", marker="v", linestyle="none", label="peer clearly faster"),
        Line2D([], [], color="#31a354", linestyle="--", label="goal (geometric mean)"),
        Line2D([], [], color="#000000", linestyle="-", label="geometric mean"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(5, len(marks)))
    return figure


def _panel(panel: Panel, peers: Peers, verdict: Verdict, measure: str) -> set[int]:
    """One family; the ranks that it has."""
    rows = peers.rows(verdict.family, peers.ours)
    panel.set_title(drawable(verdict.family.name), loc="left")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.axhline(1.0, color="#888888", linewidth=0.8)
    if verdict.family.speedup is not None:
        panel.axhline(verdict.family.speedup, color="#31a354", linestyle="--", linewidth=1.0)
    if verdict.overall:
        panel.axhline(verdict.overall.geomean_speedup, color="#000000", linewidth=0.9)
    sizes = sorted({tokens(row.cell.axes) for row in rows})
    found: set[int] = set()
    for size in sizes:
        group = [row for row in rows if tokens(row.cell.axes) == size]
        for row, shift in zip(group, np.linspace(-SPREAD, SPREAD, len(group)) * 6, strict=True):
            if ratio := _ratio(peers, row, measure):
                rank = integer(row.cell.axes, "rank")
                found.add(rank)
                _point(panel, size * 2.0**shift, ratio[0], ratio[1], RANKS.get(rank, OTHER_RANK))
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    panel.tick_params(axis="x", labelsize=7, rotation=45 if len(sizes) > 6 else 0)
    panel.set_xlabel("tokens in the batch")
    return found


def _ratio(peers: Peers, row: Row, measure: str) -> tuple[float, str] | None:
    """The ratio of a point and whether it is `faster`, `slower` or `unclear`; None where a number is missing."""
    other = peers.view.analysis.fastest(row, peers.opponents, measure)
    mine, theirs = row.summary(measure), other.summary(measure) if other else None
    if mine is None or theirs is None:
        return None
    clear = "faster" if mine.ci_high < theirs.ci_low else "slower" if mine.ci_low > theirs.ci_high else "unclear"
    return theirs.median / mine.median, clear


def _point(panel: Panel, at: float, ratio: float, clear: str, color: str) -> None:
    if clear == "slower":
        panel.plot([at], [ratio], color="#d62728", marker="v", markersize=4, linestyle="none")
    else:
        style = "full" if clear == "faster" else "none"
        panel.plot([at], [ratio], color=color, marker="o", fillstyle=style, markersize=2.6, linestyle="none")
