"""The figures of document 000's report. Owns what they show and where; computes nothing but axis limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes as Panel
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from smbench.document_lora import Lora
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.views import Axes, Plot

PANELS_ACROSS = 3
TICKS_ACROSS = 6
AXIS_MARGIN = 1.3
"""Room above and below the lines."""
LEAST_SPAN = 4.0
"""The time axis spans at least this factor, so that noise does not look like a trend."""
FEW_POINTS = 12
"""Lines with no more points than this have a mark on each."""
RATIO_LIMIT = 4.0
"""The colours of the speed-up figure end at this factor either way; the scale says so."""
PUBLISHED_STYLES = ((0, (6, 2)), (0, (1.2, 1.6)), (0, (5, 2, 1.2, 2)), (0, (9, 3)))
GREYS = ("#333333", "#777777", "#999999", "#555555")


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A figure with its visible panels, the points of each, and how many panels make a row."""

    figure: Figure
    panels: Sequence[Panel]
    groups: Sequence[Sequence[Axes]]
    across: int


def draw(plot: Plot, lora: Lora) -> bytes:
    """The PNG of one planned figure."""
    drawing: Mapping[str, Callable[[Plot, Lora], Figure]] = {
        "duration": _duration,
        "speedup": _speedup,
        "published": _published,
    }
    return png(lambda: drawing[plot.kind](plot, lora))


def _duration(plot: Plot, lora: Lora) -> Figure:
    """Time against hidden size, a panel for each length and batch, a line for each provider."""
    view, subject, measure = lora.view, plot.subjects[0], plot.measure.name
    sheet = _sheet(plot, lora)
    sheet.figure.suptitle(drawable(f"{subject}\n{plot.measure.title}"), fontsize=10)
    for panel, points in zip(sheet.panels, sheet.groups, strict=True):
        for provider in view.providers:
            _line(panel, lora, subject, provider, points, measure)
    # the bound is far below every time at small sizes: it must not stretch the axis that all panels share
    _limit(sheet.panels)
    if plot.measure.l2 == "cold":
        for panel, points in zip(sheet.panels, sheet.groups, strict=True):
            _bound(panel, lora, subject, points)
    _finish(sheet)
    return sheet.figure


def _published(plot: Plot, lora: Lora) -> Figure:
    """The same beside the published numbers of another card, which are grey and dashed."""
    view, subject, measure = lora.view, plot.subjects[0], plot.measure.name
    sheet = _sheet(plot, lora)
    published = lora.published
    card = published.device if published else ""
    sheet.figure.suptitle(
        drawable(
            f"{subject}; colours: measured here; dashed grey: published for {card}, another card\n{plot.measure.title}"
        ),
        fontsize=10,
    )
    config = lora.published_configs(subject)[-1]
    for panel, points in zip(sheet.panels, sheet.groups, strict=True):
        for provider in view.providers:
            _line(panel, lora, subject, provider, points, measure)
        styles = zip(PUBLISHED_STYLES, GREYS, strict=True)
        for (dash, grey), name in zip(styles, ["jee", *lora.published_peers], strict=False):
            pairs = [(p["hidden_size"], lora.published_seconds(subject, p, name, config)) for p in points]
            known = [(x, seconds * 1e6) for x, seconds in pairs if seconds]
            if known:
                what = drawable(f"published: {name} {config}" if name == "jee" else f"published: {name}")
                panel.plot(*zip(*known, strict=True), color=grey, linestyle=dash, linewidth=1.0, label=what)
    _limit(sheet.panels)
    _finish(sheet)
    return sheet.figure


def _sheet(plot: Plot, lora: Lora) -> _Sheet:
    """A figure with a log-log panel for each combination of the axes but the hidden size, sharing their scales."""
    subject = plot.subjects[0]
    order = [axis for axis in lora.view.varying(subject) if axis != "hidden_size"]
    groups: dict[str, list[Axes]] = {}
    keyed = [(tuple(point[axis] for axis in order), point) for point in lora.view.points(subject)]
    for key, point in sorted(keyed, key=lambda item: [(isinstance(value, str), value) for value in item[0]]):
        title = ", ".join(f"{axis} {value}" for axis, value in zip(order, key, strict=True))
        groups.setdefault(title, []).append(point)
    for points in groups.values():
        points.sort(key=lambda point: point["hidden_size"])
    # with two axes, a row of panels for each value of the first
    across = min(PANELS_ACROSS, len(groups) if len(order) < 2 else len(lora.view.values(subject)[order[-1]]))
    down = math.ceil(len(groups) / across)
    figure = Figure(figsize=(WIDTH_PX / DPI, 2.35 * down + 1.1), dpi=DPI, layout="constrained")
    panels: list[Panel] = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for panel, title in itertools.zip_longest(panels, groups):
        if title is None:
            panel.set_visible(False)
            continue
        panel.set_title(drawable(title), loc="left")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    return _Sheet(figure, panels[: len(groups)], list(groups.values()), across)


def _line(panel: Panel, lora: Lora, subject: str, provider: str, points: Sequence[Axes], measure: str) -> None:
    """One provider's medians with their interval as a band; a gap where a number is missing."""
    row = lora.view.analysis.recipe.providers[provider]
    summaries = [lora.view.summary(subject, provider, point, measure) for point in points]
    if not any(summaries):
        return
    sizes = np.asarray([point["hidden_size"] for point in points], dtype=float)
    medians, low, high = (
        np.asarray([getattr(summary, name) * 1e6 if summary else math.nan for summary in summaries])
        for name in ("median", "ci_low", "ci_high")
    )
    known = np.isfinite(medians)
    # a number alone between two gaps would draw no line
    beside = np.pad(known, 1)
    alone = known & ~beside[:-2] & ~beside[2:]
    marked = known if len(sizes) <= FEW_POINTS else alone
    panel.plot(sizes, medians, color=row.color, label=drawable(row.title))
    panel.plot(sizes[marked], medians[marked], color=row.color, linestyle="none", marker="o", markersize=3)
    panel.fill_between(sizes, low, high, color=row.color, alpha=0.25, linewidth=0)


def _bound(panel: Panel, lora: Lora, subject: str, points: Sequence[Axes]) -> None:
    """What the memory of the card allows at least, where the card is known."""
    known: dict[Any, float] = {}
    for point in points:
        for provider in lora.view.providers:
            row = lora.view.analysis.row(subject, provider, **point)
            bound = lora.view.memory_bound_s(row) if row else None
            if bound:
                known.setdefault(point["hidden_size"], bound * 1e6)
    if known:
        panel.plot(
            list(known),
            list(known.values()),
            color="#000000",
            linestyle=":",
            linewidth=1.0,
            label="least bytes / peak bandwidth",
        )


def _limit(panels: Sequence[Panel]) -> None:
    """Fix the shared time axis to the lines drawn so far, widened to LEAST_SPAN: one wild interval may leave it."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for panel in panels for line in panel.get_lines()]
    values = np.concatenate([values[np.isfinite(values)] for values in drawn])
    low, high = float(values.min()), float(values.max())
    margin = max(AXIS_MARGIN, math.sqrt(LEAST_SPAN / (high / low)))
    panels[0].set_ylim(low / margin, high * margin)


def _finish(sheet: _Sheet) -> None:
    """Ticks in plain numbers, labels at the edges, one legend below all panels."""
    low, high = (math.log2(limit) for limit in sheet.panels[0].get_xlim())
    powers = range(math.ceil(low), math.floor(high) + 1)
    ticks = [2**power for power in powers[:: math.ceil(len(powers) / TICKS_ACROSS)]]
    bottom, top = sheet.panels[0].get_ylim()
    steps = (1, 2, 5) if top > 10 * bottom else (1, 1.5, 2, 3, 4, 5, 7)
    for i, panel in enumerate(sheet.panels):
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        panel.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.tick_params(axis="x", labelbottom=True)
        if i + sheet.across >= len(sheet.panels):
            panel.set_xlabel("hidden_size")
        if i % sheet.across == 0:
            panel.set_ylabel("µs per call")
    handles = {}
    for panel in sheet.panels:
        handles.update({str(line.get_label()): line for line in panel.get_lines()})
    named = {label: line for label, line in handles.items() if not label.startswith("_")}
    sheet.figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=min(4, max(1, len(named))))


def _speedup(plot: Plot, lora: Lora) -> Figure:
    """Time of the fastest peer over ours at every point: a map of hidden size by length and batch."""
    view = lora.view
    best = view.best or ""
    shown = [subject for subject in plot.subjects if _grid(lora, subject, plot.measure.name)[2].size]
    grids = {subject: _grid(lora, subject, plot.measure.name) for subject in shown}
    heights = [max(2, len(rows)) for rows, _, _ in grids.values()]
    figure = Figure(figsize=(WIDTH_PX / DPI, 0.2 * sum(heights) + 0.85 * len(heights) + 0.9), dpi=DPI)
    figure.set_layout_engine("constrained")
    figure.suptitle(
        drawable(f"Time of the fastest peer over time of {view.title(best)}\n{plot.measure.title}"),
        fontsize=10,
    )
    scale = LinearSegmentedColormap.from_list("ratio", ["#b2182b", "#f4a582", "#f7f7f7", "#92c5de", "#2166ac"])
    colours = scale.with_extremes(bad="#ffffff")
    norm = Normalize(-math.log2(RATIO_LIMIT), math.log2(RATIO_LIMIT))
    panels = list(figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights).flat)
    image = None
    for panel, (subject, (rows, sizes, ratios)) in zip(panels, grids.items(), strict=True):
        image = panel.imshow(np.log2(ratios), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        panel.set_title(drawable(subject), loc="left")
        panel.grid(visible=False)
        panel.set_yticks(range(len(rows)), [drawable(row) for row in rows], fontsize=7)
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes], rotation=90, fontsize=6.5)
        for x, y in np.argwhere(np.isnan(ratios.T)):
            panel.text(x, y, "–", ha="center", va="center", color="#999999", fontsize=6)
    if image is not None:
        ticks = [1 / 4, 1 / 2, 1, 2, 4]
        bar = figure.colorbar(image, ax=panels, orientation="vertical", fraction=0.025, pad=0.01, extend="both")
        bar.set_ticks([math.log2(tick) for tick in ticks], labels=["1/4×", "1/2×", "1×", "2×", "4×"])
        bar.set_label("below 1 the peer is faster, above 1 ours", fontsize=8)
    return figure


def _grid(lora: Lora, subject: str, measure: str) -> tuple[list[str], list[Any], np.ndarray]:
    """Row labels, hidden sizes and the ratios [rows, hidden sizes], NaN where one side has no number."""
    view = lora.view
    order = [axis for axis in view.varying(subject) if axis != "hidden_size"]
    rows = sorted({tuple(point[axis] for axis in order) for point in view.points(subject)})
    sizes = sorted({point["hidden_size"] for point in view.points(subject)})
    ratios = np.full((len(rows), len(sizes)), np.nan)
    for point in view.points(subject):
        ratio = view.ratio(subject, view.best or "", view.peers, point, measure)
        if ratio is not None:
            ratios[rows.index(tuple(point[axis] for axis in order)), sizes.index(point["hidden_size"])] = ratio
    labels = [", ".join(f"{axis} {value}" for axis, value in zip(order, row, strict=True)) for row in rows]
    return labels, sizes, ratios
