"""The figures of document 001's report: time against block size. Owns what they show and where; computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from smbench.cell import AxisValue
from smbench.document_paged import Column, DocumentTable, Paged, integer
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.stats import Summary
from smbench.views import Axes, Plot

PANELS_ACROSS = 4
PANEL_HEIGHT = 2.5
MOST_COLUMNS = 2
"""Of the legend: labels of published lines are long."""
MODES: Mapping[str, tuple[str, str]] = {
    "table": ("#d62728", "with the page table"),
    "contiguous": ("#1f77b4", "without page table lookup"),
    "same-block": ("#2ca02c", "no offset: one block for everything, no attention"),
}
"""Colour and legend of each address mode."""
GREY = "#888888"
STYLES: Mapping[str, Any] = {"table": "-", "contiguous": (0, (5, 2)), "same-block": (0, (1.2, 1.6))}
"""Lines of the published numbers, which are all grey."""


def draw(plot: Plot, paged: Paged) -> bytes:
    """The PNG of one planned figure."""
    drawing: Mapping[str, Callable[[Plot, Paged], Figure]] = {"modes": _modes, "field": _field}
    return png(lambda: drawing[plot.kind](plot, paged))


def _modes(plot: Plot, paged: Paged) -> Figure:
    """A row of panels for each provider of the document's tables, a panel for each batch and length."""
    shapes = list(dict.fromkeys((column.batch, column.seq_len) for table in paged.tables() for column in table.columns))
    figure = _figure(len(paged.tabled), len(shapes), f"the document's layout\n{plot.measure.title}")
    panels = figure.subplots(len(paged.tabled), len(shapes), sharex=True, sharey="row", squeeze=False)
    for i, provider in enumerate(paged.tabled):
        for j, (batch, seq_len) in enumerate(shapes):
            panel: Panel = panels[i][j]
            panel.set_title(drawable(f"batch {batch}, {seq_len} tokens"), loc="left")
            if j == 0:
                panel.set_ylabel(drawable(f"{_short(paged.view.title(provider))}\nµs per call"))
            for address, (colour, label) in MODES.items():
                column = Column("", batch, seq_len, address)
                _line(panel, paged.blocks, [paged.number(provider, column, b) for b in paged.blocks], colour, label)
                if i == 0 and paged.published:
                    _published(panel, paged, column)
            _ticks(panel, paged.blocks, bottom=i + 1 == len(paged.tabled))
    _legend(figure)
    return figure


def _published(panel: Panel, paged: Paged, column: Column) -> None:
    """The document's own numbers, of another card, in grey."""
    titles = ("Original vllm", "Without page table lookup", "No offset")
    tables = [DocumentTable(title, column.seq_len, (), True) for title in titles]
    known = {
        integer(block): seconds * 1e6
        for table in tables
        for block in paged.blocks
        if (seconds := paged.published_seconds(table, column, block)) is not None
    }
    if known and paged.published:
        label = f"published, {paged.published.device}: {MODES[column.address][1]}"
        panel.plot(
            list(known),
            list(known.values()),
            color=GREY,
            linestyle=STYLES[column.address],
            linewidth=1.0,
            marker="o",
            markersize=2,
            label=drawable(label),
        )


def _field(plot: Plot, paged: Paged) -> Figure:
    """A panel for each shape of equal lengths, a line for each provider."""
    shapes = [shape for shape in paged.field.shapes() if len(paged.field.blocks(shape)) > 1]
    across = min(PANELS_ACROSS, max(1, len(shapes)))
    down = max(1, math.ceil(len(shapes) / across))
    figure = _figure(down, across, plot.measure.title)
    panels: Sequence[Panel] = list(figure.subplots(down, across, sharex=True, squeeze=False).flat)
    for i, panel in enumerate(panels):
        if i >= len(shapes):
            panel.set_visible(False)
            continue
        shape = shapes[i]
        panel.set_title(drawable(_shape_title(shape)), loc="left", fontsize=8)
        blocks = paged.field.blocks(shape)
        for provider in paged.view.providers:
            row = paged.view.analysis.recipe.providers[provider]
            numbers = [paged.field.number(provider, shape, block) for block in blocks]
            _line(panel, blocks, numbers, row.color, row.title)
        if i % across == 0:
            panel.set_ylabel("µs per call")
        _ticks(panel, blocks, bottom=i + across >= len(shapes))
    _legend(figure)
    return figure


def _figure(down: int, across: int, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_PX / DPI, PANEL_HEIGHT * down + 1.2), dpi=DPI, layout="constrained")
    figure.suptitle(drawable(f"Time against block size, {title}" if "\n" in title else title), fontsize=10)
    return figure


def _line(
    panel: Panel, blocks: Sequence[AxisValue], numbers: Sequence[Summary | None], colour: str, label: str
) -> None:
    """Medians with their interval as a band; a gap where a number is missing."""
    if not any(numbers):
        return
    sizes = np.asarray(blocks, dtype=float)
    medians, low, high = (
        np.asarray([getattr(number, name) * 1e6 if number else math.nan for number in numbers])
        for name in ("median", "ci_low", "ci_high")
    )
    panel.plot(sizes, medians, color=colour, marker="o", markersize=3, label=drawable(label))
    panel.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)


def _ticks(panel: Panel, blocks: Sequence[AxisValue], bottom: bool) -> None:
    """Plain numbers on both axes."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator([integer(block) for block in blocks]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    bottom_limit, top_limit = panel.get_ylim()
    steps = (1, 2, 5) if top_limit > 4 * bottom_limit else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if bottom:
        panel.set_xlabel("block size, tokens")


def _legend(figure: Figure) -> None:
    """One legend below all panels."""
    handles = {}
    for panel in figure.axes:
        handles.update({str(line.get_label()): line for line in panel.get_lines()})
    named = {label: line for label, line in handles.items() if not label.startswith("_")}
    if named:
        figure.legend(
            list(named.values()), list(named), loc="outside lower center", ncols=min(MOST_COLUMNS, len(named))
        )


def _short(title: str) -> str:
    """A provider's title without what it says in brackets."""
    return title.partition(" (")[0]


def _shape_title(shape: Axes) -> str:
    """A shape in as few words as a panel has room for."""
    plain = f"{shape['heads']}/{shape['kv_heads']} heads, batch {shape['batch']}, {shape['seq_len']}"
    size = "" if shape["head_dim"] == 128 else f", d {shape['head_dim']}"
    return plain + size + ("" if shape["dtype"] == "float16" else f", {shape['dtype']}")
