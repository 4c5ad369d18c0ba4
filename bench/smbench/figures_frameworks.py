"""The figures of document 004's report. Owns what they show and where; computes nothing but axis limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from smbench.document_frameworks import Frameworks
from smbench.document_frameworks_conclusions import front
from smbench.document_frameworks_load import Online
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.views import Plot

BAR_INCHES = 0.3
LATENCIES = (("ttft", "median time to first token, ms"), ("tpot", "median time of each further token, ms"))
MOST_LABELS = 24
"""With more points only those of the fronts are labelled: the others would lie on each other."""


def draw(plot: Plot, frameworks: Frameworks) -> bytes:
    """The PNG of one planned figure."""
    drawing: Mapping[str, Callable[[Plot, Frameworks], Figure]] = {"static": _static, "pareto": _pareto}
    return png(lambda: drawing[plot.kind](plot, frameworks))


def _static(plot: Plot, frameworks: Frameworks) -> Figure:
    """A bar for each case with decode steps: its prefill, and the steps after it."""
    group = frameworks.cells.static[int(plot.subjects[0])]
    cases = [case for case in frameworks.cases(group) if case.step]
    figure = Figure(figsize=(WIDTH_PX / DPI, BAR_INCHES * len(cases) + 1.3), dpi=DPI, layout="constrained")
    panel = figure.add_subplot()
    table = frameworks.view.analysis.recipe.providers
    labels = []
    for place, case in enumerate(cases):
        color = table[case.row.cell.provider].color
        prefill_s = case.prefill.median if case.prefill else 0.0
        panel.barh(place, prefill_s, color=color, height=0.7)
        panel.barh(place, case.total.median - prefill_s, left=prefill_s, color=color, alpha=0.45, height=0.7)
        panel.text(case.total.median, place, f" {case.rates['output_throughput']:.4g} token/s", va="center")
        title = frameworks.view.title(case.row.cell.provider)
        labels.append(f"{title}: batch {case.batch}, {case.input_len} + {case.output_len} tokens")
    panel.set_yticks(range(len(cases)), [drawable(label) for label in labels])
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.margins(x=0.15)
    said = frameworks.cells.words(group.setting)
    figure.suptitle(drawable(f"{said}\nfull colour: prefill, pale: decode steps; output tokens a second"), fontsize=9)
    panel.set_xlabel("seconds a batch")
    return figure


def _pareto(plot: Plot, frameworks: Frameworks) -> Figure:
    """Output tokens a second against two latencies: all loads, and each engine's front."""
    group = frameworks.cells.online[int(plot.subjects[0])]
    found = frameworks.same_prompts(group)
    figure = Figure(figsize=(WIDTH_PX / DPI, 5.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(LATENCIES), sharey=True)
    for panel, (latency, title) in zip(panels, LATENCIES, strict=True):
        _fronts(panel, frameworks, found, latency)
        panel.set_xlabel(title)
    panels[0].set_ylabel("output tokens a second")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(loc="best")
    said = frameworks.cells.words(group.setting)
    figure.suptitle(
        drawable(
            f"{said}\nlines: each engine's Pareto front; hollow: a load that another of the same engine beats\n"
            "8: so many requests at a time, 8/s: so many a second, all: all at once"
        ),
        fontsize=9,
    )
    return figure


def _fronts(panel: Panel, frameworks: Frameworks, found: Sequence[Online], latency: str) -> None:
    seen = [entry for entry in found if latency in entry.spreads]
    table = frameworks.view.analysis.recipe.providers
    for order, provider in enumerate(dict.fromkeys(entry.row.cell.provider for entry in seen)):
        # labels of engines that are as fast lie above and below each other
        place = (4, 3) if order % 2 == 0 else (4, -8)
        mine = [entry for entry in seen if entry.row.cell.provider == provider]
        best = front(mine, latency)
        color = table[provider].color
        label = drawable(table[provider].title)
        panel.plot(*_places(best, latency), color=color, marker="o", markersize=5, label=label)
        beaten = [entry for entry in mine if not any(entry is other for other in best)]
        if beaten:
            panel.plot(
                *_places(beaten, latency), color=color, marker="o", markersize=5, markerfacecolor="white", linestyle=""
            )
        labelled = mine if len(seen) <= MOST_LABELS else best
        for entry, x, y in zip(labelled, *_places(labelled, latency), strict=True):
            panel.annotate(_load(entry), (x, y), xytext=place, textcoords="offset points", fontsize=6.5, color=color)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _places(entries: Sequence[Online], latency: str) -> tuple[list[float], list[float]]:
    return (
        [entry.spreads[latency].median * 1e3 for entry in entries],
        [entry.rates["output_throughput"] for entry in entries],
    )


def _load(entry: Online) -> str:
    """A load in a word: so many at a time, or so many a second."""
    if entry.load.max_concurrency is not None:
        return str(entry.load.max_concurrency)
    return "all" if entry.load.request_rate is None else f"{entry.load.request_rate:g}/s"
