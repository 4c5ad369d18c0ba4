"""The figures of document 002's report. Owns what they show and where; computes nothing but axis limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from smbench.document_gptq import Gptq
from smbench.document_gptq_cells import E2E, TTFT, Sweep
from smbench.document_gptq_fit import Fit
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.views import Plot

GREYS = ("#333333", "#9a9a9a")
"""A card of the document each."""
DASHES: Sequence[tuple[int, tuple[float, ...]]] = ((0, (6, 2)), (0, (1.2, 1.6)), (0, (5, 2, 1.2, 2)))
"""A column of a published table each."""
BAR_INCHES = 0.3
AXIS_MARGIN = 1.25
"""Room above and below the lines of a logarithmic axis."""
LEAST_SPAN = 4.0
"""A logarithmic time axis spans at least this factor, so that noise does not look like a trend."""


def draw(plot: Plot, gptq: Gptq) -> bytes:
    """The PNG of one planned figure."""
    drawing: Mapping[str, Callable[[Plot, Gptq], Figure]] = {
        "prefill": _prefill,
        "decoding": _decoding,
        "dequantize": _dequantize,
    }
    return png(lambda: drawing[plot.kind](plot, gptq))


def _prefill(plot: Plot, gptq: Gptq) -> Figure:
    """Seconds a request against the chunk size, both logarithmic; published cards grey and dashed."""
    sweep = gptq.cells.sweeps[int(plot.subjects[0])]
    figure = Figure(figsize=(WIDTH_PX / DPI, 5.2), dpi=DPI, layout="constrained")
    panel = figure.add_subplot()
    where = ", ".join(gptq.view.machines.names())
    panel.set_title(drawable(f"{sweep.input_len} prompt and {sweep.setting['output_len']} output tokens on {where}"))
    times = [_provider_line(panel, gptq, sweep, name) for name in sweep.providers]
    for card, grey in zip(gptq.beside, GREYS, strict=False):
        for column, dash in zip(card.columns, DASHES, strict=False):
            pairs = sorted(card.times(column).items())
            xs, ys = zip(*pairs, strict=True)
            label = drawable(f"published, {card.name}: {column}")
            panel.plot(xs, ys, color=grey, linestyle=dash, linewidth=1.0, label=label)
            times.append(list(ys))
        impossible = [seen for seen in card.sweep.values() if card.refuted([seen])]
        panel.plot(
            [int(seen.at["chunk_tokens"]) for seen in impossible],
            [seen.value for seen in impossible],
            color=grey,
            marker="x",
            markersize=6,
            linestyle="none",
            label=drawable(f"impossible on {card.name}") if impossible else None,
        )
    panel.set_xscale("log", base=2)
    _log_seconds(panel, [value for line in times for value in line])
    panel.set_xlabel("most tokens that one step processes (max_num_batched_tokens)")
    panel.set_ylabel("seconds a request")
    panel.xaxis.set_major_locator(FixedLocator(sweep.chunks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.legend(loc="upper right")
    return figure


def _provider_line(panel: Panel, gptq: Gptq, sweep: Sweep, provider: str) -> list[float]:
    """Medians of a provider with their interval as a band, a gap where one is missing; the ends of all intervals."""
    found = [(chunk, row.summary(E2E) if (row := sweep.row(chunk, provider)) else None) for chunk in sweep.chunks]
    summaries = [summary for _, summary in found if summary]
    if not summaries:
        return []
    look = gptq.view.analysis.recipe.providers[provider]
    xs = np.asarray([chunk for chunk, _ in found], dtype=float)
    medians, low, high = (
        np.asarray([getattr(summary, name) if summary else np.nan for _, summary in found])
        for name in ("median", "ci_low", "ci_high")
    )
    panel.plot(xs, medians, color=look.color, marker="o", markersize=3.5, label=drawable(look.title))
    panel.fill_between(xs, low, high, color=look.color, alpha=0.2, linewidth=0)
    return [end for summary in summaries for end in (summary.ci_low, summary.ci_high)]


def _decoding(plot: Plot, gptq: Gptq) -> Figure:
    """A bar for each configuration: up to the first token, and the steps after it; published cards grey."""
    phases = [entry for entry in gptq.phases(gptq.cells.decoding) if entry.summary(E2E)]
    published = [(card, label, seen) for card in gptq.beside for label, seen in card.decoding.items()]
    count = len(phases) + len(published)
    figure = Figure(figsize=(WIDTH_PX / DPI, BAR_INCHES * count + 1.3), dpi=DPI, layout="constrained")
    panel = figure.add_subplot()
    table = gptq.view.analysis.recipe.providers
    labels = []
    for place, entry in enumerate(phases):
        whole, first = entry.summary(E2E), entry.summary(TTFT)
        color = table[entry.row.cell.provider].color
        prefill_s = first.median if first else entry.split.prefill.value if entry.split else 0.0
        if whole:
            panel.barh(place, prefill_s, color=color, height=0.7)
            panel.barh(place, whole.median - prefill_s, left=prefill_s, color=color, alpha=0.45, height=0.7)
            panel.text(whole.median, place, f" {whole.median:.2f}", va="center")
        labels.append(entry.name)
    for place, (card, label, seen) in enumerate(published, start=len(phases)):
        panel.barh(place, seen.value, color=GREYS[1], height=0.7)
        shown = card.shown(seen)
        marks = f" ({', '.join(map(str, shown.marks))})" if shown and shown.marks else ""
        panel.text(seen.value, place, f" {seen.value:.2f}{marks}", va="center")
        labels.append(f"published, {card.name.removeprefix('NVIDIA ').removeprefix('GeForce ')}: {label}")
    panel.set_yticks(range(count), [drawable(label) for label in labels])
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.margins(x=0.08)
    axes = gptq.cells.decoding[0].cell.axes
    lengths = f"{axes['input_len']} prompt and {axes['output_len']} output tokens"
    grey = "\ngrey: published for other machines, in brackets the finding of the audit" if published else ""
    figure.suptitle(
        drawable(f"{lengths}; full colour: up to the first token, pale: the steps after it{grey}"), fontsize=9
    )
    panel.set_xlabel("seconds a request")
    return figure


def _dequantize(plot: Plot, gptq: Gptq) -> Figure:
    """Seconds against the number of chunks, with the fitted lines; the points of the other kernel hollow."""
    figure = Figure(figsize=(WIDTH_PX / DPI, 4.8), dpi=DPI, layout="constrained")
    panel = figure.add_subplot()
    colors = ["#d62728", "#1f77b4", "#2ca02c", "#9467bd"]
    for entry, color in zip(gptq.fits, colors, strict=False):
        _fitted(panel, entry, color, DASHES[0])
    for entry, grey in zip(gptq.published_fits, GREYS, strict=False):
        _fitted(panel, entry, grey, DASHES[1])
    limit = gptq.fits[0].limit_rows
    panel.set_title(drawable(f"T = T0 + chunks · t; hollow: chunks of up to {limit} tokens, another kernel"))
    panel.set_xlabel("chunks of a prompt")
    panel.set_ylabel("seconds a request")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.legend(loc="upper left")
    return figure


def _fitted(panel: Panel, entry: Fit, color: str, dash: tuple[int, tuple[float, ...]]) -> None:
    """Points, line and the interval of its slope in the legend."""
    slope = entry.per_chunk
    label = f"{entry.name}: {slope.value * 1e3:.1f} ms a chunk ({slope.low * 1e3:.1f} to {slope.high * 1e3:.1f})"
    panel.plot(
        [point.chunks for point in entry.fitted],
        [point.seconds for point in entry.fitted],
        color=color,
        marker="o",
        linestyle="none",
        label=drawable(label),
    )
    panel.plot(
        [point.chunks for point in entry.switched],
        [point.seconds for point in entry.switched],
        color=color,
        marker="o",
        markerfacecolor="white",
        linestyle="none",
    )
    last = max(point.chunks for point in (*entry.fitted, *entry.switched))
    panel.plot([0, last], [entry.at(0), entry.at(last)], color=color, linestyle=dash, linewidth=1.0)


def _log_seconds(panel: Panel, times: Sequence[float]) -> None:
    """A logarithmic axis of seconds around some times, with plain numbers on it."""
    low, high = min(times) / AXIS_MARGIN, max(times) * AXIS_MARGIN
    if high / low < LEAST_SPAN:
        middle = (low * high) ** 0.5
        low, high = middle / LEAST_SPAN**0.5, middle * LEAST_SPAN**0.5
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
