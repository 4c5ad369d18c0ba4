"""The figures of document 003's second half: requests, their latency, the block, copies. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes as Panel
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from smbench.cell import AxisValue
from smbench.document_hstu_inference import HstuInference
from smbench.document_hstu_inference_block import WITHOUT, Line, integer
from smbench.document_hstu_inference_published import VARIANTS, Edition
from smbench.document_hstu_inference_transfers import Copied
from smbench.figures import DPI, WIDTH_PX, drawable, png
from smbench.views import Plot

HEIGHT = 4.0
ROW_HEIGHT = 2.9
MOST_COLUMNS = 4
MOST_BATCHES = 4
PLACE_HEIGHT = 0.62
"""Of a point whose cache is on the host."""
GREY = "#999999"
SHADES = ("viridis", 0.9)
"""Colours of lines by the number of new tokens, the fewest first; the map's end is too bright on white."""
NARROW = 4
"""Up to this ratio of the ends of a logarithmic axis every digit gets a tick."""


def draw(plot: Plot, document: HstuInference) -> bytes:
    """The PNG of one planned figure."""
    drawing: Mapping[str, Callable[[Plot, HstuInference], Figure]] = {
        "requests": _requests,
        "latency": _latency,
        "block": _block,
        "transfers": _transfers,
    }
    return png(lambda: drawing[plot.kind](plot, document))


def _requests(plot: Plot, document: HstuInference) -> Figure:
    """The document's figure: sums over all lengths of history, bars by batch; published ones in panels of their own."""
    editions = document.others.requests
    figure = _figure(HEIGHT, f"One request at each of {len(document.lengths)} lengths of history, added up")
    panels = figure.subplots(1, 1 + len(editions), squeeze=False)[0]
    totals = [[document.total(provider, batch) for batch in document.batches] for provider in document.variants]
    ours = [[total.seconds if total else None for total in row] for row in totals]
    machine = ", ".join(document.view.machines.names())
    _bars(panels[0], document.variants, document, document.batches, ours, hatch="")
    panels[0].set_title(drawable(f"measured, {machine}"), loc="left")
    for panel, edition in zip(panels[1:], editions, strict=True):
        batches = list(dict.fromkeys(key[1] for key in edition.numbers))
        sums = [[document.published_total(edition, name, batch) for batch in batches] for name in VARIANTS]
        _bars(panel, list(VARIANTS), document, batches, sums, hatch="//")
        what = "faulty attention" if edition.verdict == "faulty" else "2026"
        panel.set_title(drawable(f"published, {edition.device}, {what}"), loc="left")
    _legend(figure)
    return figure


def _bars(
    panel: Panel,
    providers: Sequence[str],
    document: HstuInference,
    batches: Sequence[AxisValue],
    seconds: Sequence[Sequence[float | None]],
    hatch: str,
) -> None:
    """A group of bars for each batch, their times above them."""
    width = 0.8 / max(1, len(providers))
    for index, (provider, row) in enumerate(zip(providers, seconds, strict=True)):
        known = document.view.analysis.recipe.providers[provider]
        places = [place + (index - (len(providers) - 1) / 2) * width for place in range(len(batches))]
        values = [value * 1e3 if value else 0.0 for value in row]
        bars = panel.bar(
            places, values, width * 0.92, color=known.color, label=drawable(known.title), hatch=hatch, edgecolor="white"
        )
        panel.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=6, padding=1)
    panel.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    panel.set_xlabel("batch")
    panel.set_ylabel("ms, sum of the medians")
    panel.grid(visible=False, axis="x")


def _latency(_plot: Plot, document: HstuInference) -> Figure:
    """Latency of a request against the history: median, and from the 10th to the 90th percentile."""
    batches = document.batches[:MOST_BATCHES]
    figure = _figure(HEIGHT, "One request: median latency, shaded from the 10th to the 90th percentile")
    for panel, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for provider in document.variants:
            row = document.view.analysis.recipe.providers[provider]
            numbers = [document.number(provider, batch, length) for length in document.lengths]
            if not any(numbers):
                continue
            xs = [integer(length) for length in document.lengths]
            medians, low, high = (
                [getattr(number, name) * 1e3 if number else math.nan for number in numbers]
                for name in ("median", "p10", "p90")
            )
            panel.plot(xs, medians, color=row.color, marker="o", markersize=3, label=drawable(row.title))
            panel.fill_between(xs, low, high, color=row.color, alpha=0.25, linewidth=0)
        panel.set_title(f"batch {batch}", loc="left")
        panel.set_xlabel("tokens of each user's history")
        panel.set_ylabel("ms")
        panel.set_ylim(bottom=0)
    _legend(figure)
    return figure


def _block(plot: Plot, document: HstuInference) -> Figure:
    """Time against the history, a line for each number of new tokens: ours, then what was published, row by row."""
    block = document.block
    best = block.best
    assert best is not None
    batches = (block.shown or block.batches)[:2] if len(block.shown) < 2 else [block.shown[0], block.shown[-1]]
    editions = document.others.blocks
    title = f"The block: time against cached history, a line for each number of new tokens\n{plot.measure.title}"
    figure = _figure(ROW_HEIGHT * (1 + len(editions)) + 0.6, title)
    panels = figure.subplots(1 + len(editions), len(batches), squeeze=False)
    device = ", ".join(document.view.machines.names())
    published = {integer(key[2]) for edition in editions for key in edition.numbers}
    shades = _shades(sorted({integer(line.new) for line in block.lines} | published))
    for panel, batch in zip(panels[0], batches, strict=True):
        lines = block.of_batch(batch)
        _curves(panel, lines, {line: _median(document, best, line) for line in lines}, shades)
        without = [line for line in lines if line.new == line.total]
        values = [_median(document, WITHOUT, line) * 1e3 for line in without]
        panel.plot([integer(x.total) for x in without], values, color=GREY, linestyle="--", label="no KV cache")
        panel.set_title(drawable(f"batch {batch}, {document.view.title(best)}, {device}"), loc="left")
        _axes(panel)
    for row, edition in zip(panels[1:], editions, strict=True):
        for panel, batch in zip(row, _published_batches(edition, batches), strict=True):
            points = {key: value for key, value in edition.numbers.items() if key[0] == batch}
            drawn = {Line(*key): value for key, value in points.items()}
            _curves(panel, list(drawn), drawn, shades)
            panel.set_title(
                drawable(f"batch {batch}, published, {edition.device}: {edition.verdict.upper()}"), loc="left"
            )
            _axes(panel)
    _legend(figure)
    return figure


def _shades(values: Sequence[int]) -> dict[int, str]:
    name, end = SHADES
    places = np.linspace(0.0, end, len(values))
    return {value: to_hex(colormaps[name](place)) for value, place in zip(values, places, strict=True)}


def _published_batches(edition: Edition, wanted: Sequence[AxisValue]) -> list[AxisValue]:
    """As many batches as there are panels: those of the edition, the first and the last."""
    known = sorted({key[0] for key in edition.numbers}, key=integer)
    return [known[0], known[-1]][: len(wanted)]


def _median(document: HstuInference, provider: str, line: Line) -> float:
    number = document.block.number(provider, line)
    return number.median if number else math.nan


def _curves(panel: Panel, lines: Sequence[Line], seconds: Mapping[Line, float], shades: Mapping[int, str]) -> None:
    for new, colour in shades.items():
        same = sorted((line for line in lines if line.new == new), key=lambda line: integer(line.total))
        if same:
            values = [seconds[line] * 1e3 for line in same]
            panel.plot(
                [integer(line.total) for line in same],
                values,
                color=colour,
                marker="o",
                markersize=3,
                label=f"{new} new",
            )


def _transfers(_plot: Plot, document: HstuInference) -> Figure:
    """What a step takes with its cache in different places, and its copies alone."""
    copied = document.transfers.copied
    figure = _figure(PLACE_HEIGHT * len(copied) + 1.4, "A step with its cached tokens in different places")
    panel = figure.subplots()
    known: Sequence[tuple[str, str, Callable[[Copied], float | None]]] = [
        ("on the device", "#2ca02c", lambda line: line.device.median if line.device else None),
        ("on the host, copied beside the layers", "#1f77b4", lambda line: line.host.median),
        ("on the host, copied first", "#ff7f0e", lambda line: line.before.median if line.before else None),
        ("the copies alone, on their stream", "#c7c7c7", lambda line: line.onload_s),
        ("nowhere, everything computed", "#7f7f7f", lambda line: line.nowhere.median if line.nowhere else None),
    ]
    entries = [entry for entry in known if any(entry[2](line) for line in copied)]
    height = 0.84 / len(entries)
    for index, (label, colour, value) in enumerate(entries):
        places = [place + (index - (len(entries) - 1) / 2) * height for place in range(len(copied))]
        values = [value(line) for line in copied]
        bars = panel.barh(places, [v * 1e3 if v else 0.0 for v in values], height * 0.9, color=colour, label=label)
        panel.bar_label(bars, [f"{v * 1e3:.3g}" if v else "" for v in values], fontsize=6, padding=2)
    names = [
        f"{'block' if line.subject == 'hstu_block' else 'request'}, batch {line.point['batch']}, "
        f"{line.point['new']} new of {line.point['total']}"
        for line in copied
    ]
    panel.set_yticks(range(len(copied)), names)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("ms")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _figure(height: float, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH_PX / DPI, height), dpi=DPI, layout="constrained")
    figure.suptitle(drawable(title), fontsize=10)
    return figure


def _axes(panel: Panel) -> None:
    """Lengths as they are and plain times, both on logarithmic axes."""
    panel.set_xscale("log", base=2)
    lengths = sorted({float(x) for line in panel.get_lines() for x in np.asarray(line.get_xdata())})
    panel.xaxis.set_major_locator(FixedLocator(lengths))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    panel.set_xlabel("tokens of each user's history")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high > NARROW * low else range(1, 10)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylabel("ms")


def _legend(figure: Figure) -> None:
    """One legend below all panels."""
    named: dict[str, Artist] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        columns = min(MOST_COLUMNS, len(named))
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)
