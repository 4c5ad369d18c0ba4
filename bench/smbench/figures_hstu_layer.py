"""The figures of document 003's first half: latency, course of memory, the attention alone. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from smbench.cell import AxisValue
from smbench.document_hstu_layer import HstuLayer
from smbench.document_hstu_layer_attention import BACKWARD, FORWARD, OUTPUTS
from smbench.document_hstu_layer_peers import LAYER
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.stats import Summary
from smbench.views import Plot

HEIGHT = 4.4
MEMORY_PANEL_HEIGHT = 1.9
MOST_COLUMNS = 3
GREY = "#888888"
MARKERS = "osv^Dx+"
"""One for each published column, whose lines are all grey."""
STYLES = {"y": "-", "dq": "--", "dk": "-.", "dv": ":"}
GIB = 2.0**30
ACCEPTABLE_TICKS = 4


def draw(plot: Plot, layer: HstuLayer) -> bytes:
    """The PNG of one planned figure."""
    drawing: Mapping[str, Callable[[Plot, HstuLayer], Figure]] = {
        "latency": _latency,
        "memory": _memory,
        "attention": _attention,
    }
    return png(lambda: drawing[plot.kind](plot, layer))


def _latency(plot: Plot, layer: HstuLayer) -> Figure:
    """Time and rate of a whole step against length by variant; left also layers of another definition, dotted, and
    the published numbers."""
    figure = _figure(HEIGHT, f"One training step against sequence length\n{plot.measure.title}")
    times, rates = figure.subplots(1, 2, sharex=True)
    for provider in layer.variants:
        row = layer.view.analysis.recipe.providers[provider]
        numbers = [layer.number(provider, length) for length in layer.lengths]
        _line(times, layer.lengths, [_ms(n) for n in numbers], row.color, row.title)
        speeds = [layer.speed(provider, length) for length in layer.lengths]
        rate = [s.flops_per_s / 1e12 if s and s.flops_per_s else math.nan for s in speeds]
        _line(rates, layer.lengths, rate, row.color, row.title)
    for line in layer.peers.lines:
        if line.operation != LAYER:
            row = layer.view.analysis.recipe.providers[line.provider]
            numbers = [layer.peers.number(line, length) for length in layer.lengths]
            label = f"{row.title}, SiLU on {line.silu}"
            _line(times, layer.lengths, [_ms(n) for n in numbers], row.color, label, marker="^", style=":")
    if layer.published and layer.comparable:
        for column, marker in zip(layer.columns, MARKERS, strict=False):
            known = [layer.published_seconds(column, length) for length in layer.lengths]
            label = f"published, {layer.published.device}: {column.header.removesuffix(' (ms)')}"
            values = [s * 1e3 if s else math.nan for s in known]
            _line(times, layer.lengths, values, GREY, label, marker=marker, width=0.7)
    times.set_ylabel("ms per step")
    rates.set_ylabel("TFLOP/s by the document's formula")
    _lengths(times, layer.lengths)
    _lengths(rates, layer.lengths)
    _plain_log(times)
    rates.set_ylim(bottom=0)
    _legend(figure)
    return figure


def _memory(_plot: Plot, layer: HstuLayer) -> Figure:
    """A panel for each variant: memory in use after each allocation and release of one step."""
    courses = layer.timelines()
    point = courses[0][1]
    layers = int(point["layers"])
    what = f"{layers} {'layers' if layers > 1 else 'layer'}, batch {point['batch']}, {point['seq_len']} tokens"
    figure = _figure(MEMORY_PANEL_HEIGHT * len(courses) + 0.6, f"Memory during one step: {what}")
    panels: Sequence[Panel] = list(figure.subplots(len(courses), 1, sharey=True, squeeze=False).flat)
    for panel, (provider, _, memory) in zip(panels, courses, strict=True):
        row = layer.view.analysis.recipe.providers[provider]
        in_use = [0.0, *(level / GIB for level in memory.timeline_bytes)]
        panel.fill_between(range(len(in_use)), in_use, step="post", color=row.color, alpha=0.3, linewidth=0)
        panel.step(range(len(in_use)), in_use, where="post", color=row.color, linewidth=1.0)
        saved = memory.saved_bytes / GIB
        panel.set_title(drawable(f"{row.title}: {saved:.2f} GiB held between the passes"), loc="left")
        panel.set_ylabel("GiB")
        panel.set_xlim(0, len(in_use) - 1)
        if memory.backward_at is not None:
            panel.axvline(memory.backward_at, color="#333333", linewidth=1.0, linestyle="--")
            top = panel.get_ylim()[1]
            panel.text(memory.backward_at, top, " backward", ha="left", va="top", fontsize=8)
            panel.text(memory.backward_at, top, "forward ", ha="right", va="top", fontsize=8)
    panels[-1].set_xlabel("allocations and releases, in order")
    return figure


def _attention(plot: Plot, layer: HstuLayer) -> Figure:
    """The attention alone: rates of both directions, and the error of every output, against length."""
    attention = layer.attention
    figure = _figure(HEIGHT, f"The attention alone against sequence length\n{plot.measure.title}")
    panels = figure.subplots(1, 3, sharex=True)
    for panel, direction, title in zip(panels, (FORWARD, BACKWARD), ("forward", "backward"), strict=False):
        for provider in attention.shown:
            row = layer.view.analysis.recipe.providers[provider]
            rates = [attention.flops_per_s(direction, provider, length) for length in attention.lengths]
            values = [rate / 1e12 if rate else math.nan for rate in rates]
            _line(panel, attention.lengths, values, row.color, row.title)
        panel.set_title(title, loc="left")
        panel.set_ylabel("TFLOP/s by the document's formula")
        panel.set_ylim(bottom=0)
    for growth in attention.growths():
        row = layer.view.analysis.recipe.providers[growth.provider]
        values = [error * 100 if error else math.nan for error in growth.errors]
        panels[2].plot(
            [int(n) for n in attention.lengths], values, color=row.color, linestyle=STYLES[growth.output], marker="."
        )
    for output in (name for names in OUTPUTS.values() for name in names):
        panels[2].plot([], [], color="#333333", linestyle=STYLES[output], label=output)
    panels[2].set_title("relative error", loc="left")
    panels[2].set_ylabel("% of the float64 reference, 2-norm")
    panels[2].set_ylim(bottom=0)
    for panel in panels:
        _lengths(panel, attention.lengths)
    _legend(figure)
    return figure


def _ms(number: Summary | None) -> float:
    return number.median * 1e3 if number else math.nan


def _figure(height: float, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_PX / DPI, height), dpi=DPI, layout="constrained")
    figure.suptitle(drawable(title), fontsize=10)
    return figure


def _line(
    panel: Panel,
    lengths: Sequence[AxisValue],
    values: Sequence[float],
    colour: str,
    label: str,
    marker: str = "o",
    width: float = 1.4,
    style: str = "-",
) -> None:
    """A line with a gap where a number is missing; nothing where all are."""
    if not all(math.isnan(value) for value in values):
        xs = [int(length) for length in lengths]
        panel.plot(
            xs, values, style, color=colour, marker=marker, markersize=3.5, linewidth=width, label=drawable(label)
        )


def _lengths(panel: Panel, lengths: Sequence[AxisValue]) -> None:
    """Lengths as they are, on a logarithmic axis."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator([int(length) for length in lengths]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    panel.set_xlabel("tokens of a sequence")


def _plain_log(panel: Panel) -> None:
    """A logarithmic axis of times with plain numbers, however narrow."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(
        LogLocator(base=10, subs=(1, 2, 5) if high > ACCEPTABLE_TICKS * low else range(1, 10))
    )
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure) -> None:
    """One legend below all panels."""
    handles = {str(line.get_label()): line for panel in figure.axes for line in panel.get_lines()}
    named = {label: line for label, line in handles.items() if not label.startswith("_")}
    if named:
        columns = min(MOST_COLUMNS, len(named))
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)
