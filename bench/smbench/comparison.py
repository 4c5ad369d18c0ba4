"""How a comparison looks: Markdown, JSON and a figure. Owns the format of compare.json; computes no verdict."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from smbench import __version__, report
from smbench.cell import AxisValue, Cell
from smbench.compare import Comparison, OneSided, Side
from smbench.formats import percent, quantity
from smbench.metrics import METRICS
from smbench.result import Status
from smbench.stats import CONFIDENCE
from smbench.verdicts import NOISE_LIMIT_FACTOR, SAME_FACTOR, VERDICTS, Row

FORMAT = 2
"""Version of compare.json. History: 1 = first; 2 = imports as sides, stated figures, which have no interval."""
TEMPLATE = "compare.md.j2"
FILES = ("compare.json", "compare.md", "compare.png")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOWN = 25
"""Rows that a table of single cells shows; compare.json has all."""


def write(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Write compare.json, compare.png and compare.md, each in one step; the figure only where a number was compared."""
    # matplotlib takes most of a second to import, so only here
    from smbench import comparefigure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = any(comparison.rows for comparison in comparisons)
    report.replace_file(folder / "compare.json", (json.dumps(as_json(comparisons), indent=1) + "\n").encode())
    if drawn:
        report.replace_file(folder / "compare.png", comparefigure.draw(comparisons))
    else:
        (folder / "compare.png").unlink(missing_ok=True)
    report.replace_file(folder / "compare.md", render(comparisons, "compare.png" if drawn else None).encode())


def render(comparisons: Sequence[Comparison], figure: str | None = None) -> str:
    """The Markdown of comparisons with one A."""
    environment = report.markdown_templates()
    environment.filters["amount"] = amount
    environment.filters["factor"] = factor
    environment.filters["fact"] = fact
    environment.filters["tolerance"] = tolerance
    text = environment.get_template(TEMPLATE).render(
        comparisons=comparisons,
        letters=LETTERS,
        sides=[comparisons[0].a, *(comparison.b for comparison in comparisons)],
        timed=_timed,
        common=_common,
        label=_label,
        worst=_worst,
        missing=_missing,
        shown=SHOWN,
        noise_limit_factor=NOISE_LIMIT_FACTOR,
        same_factor=SAME_FACTOR,
        verdicts=VERDICTS,
        confidence=CONFIDENCE,
        figure=figure,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def as_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "format": FORMAT,
        "smbench_version": __version__,
        "confidence": CONFIDENCE,
        "margin": comparisons[0].margin,
        "a": _side(comparisons[0].a),
        "comparisons": [_comparison(comparison) for comparison in comparisons],
    }


def amount(value: float, metric: str) -> Markup:
    """A value of a metric with its unit; times below 10 ms in µs."""
    unit = METRICS[metric].unit
    if unit != "s":
        return Markup(f"{value:.4g} {unit}")
    return Markup(f"{value * 1e6:.4g} µs" if value < 0.01 else f"{value:.4g} s")


def factor(ratio: float) -> Markup:
    """A ratio to a thousandth, as small differences are what a comparison is about."""
    return Markup(f"{ratio:.3f}" if 0.1 <= ratio < 10 else f"{ratio:.4g}")


def tolerance(share: float) -> Markup:
    """What noise explains, as per cent; beyond a factor of two no figure helps."""
    return percent(share) if share < 1 else Markup("> 100 %")


def fact(values: Sequence[object], name: str) -> Markup:
    """A side's values of a fact of its environment."""
    return Markup(", ").join(quantity(value, name) for value in values) if values else Markup("absent")


def _side(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "kind": side.kind,
        "recipe": side.recipe,
        "profile": side.profile,
        "protocol_version": side.protocol_version,
        "devices": sorted(side.devices),
        "runs": side.runs,
        "cells": len(side.entries),
        "cells_with_a_number": _timed(side),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "b": _side(comparison.b),
        "counts": comparison.counts(),
        "noise": [
            {"measurement": noise.measurement, "source": noise.source, "relative_sd": noise.sd}
            for noise in comparison.noise
        ],
        "shifts": [
            {
                "measurement": shift.measurement,
                "verdict": shift.verdict,
                "cells": shift.cells,
                "of": shift.of,
                "geomean_ratio": shift.geomean_ratio,
            }
            for shift in comparison.shifts
        ],
        "groups": [
            {
                "measurement": group.measurement,
                "subject": group.subject,
                "provider": group.provider,
                "cells": group.cells,
                "geomean_ratio": group.geomean_ratio,
                "counts": group.counts,
            }
            for group in comparison.groups()
        ],
        "cells": [_row(row) for row in comparison.rows],
        "incomparable": [
            {"field": entry.field, "a": entry.a, "b": entry.b, "cell_ids": [cell.cell_id for cell in entry.cells]}
            for entry in comparison.incomparable
        ],
        "one_sided": [
            {"cell_id": entry.cell.cell_id, "a": entry.a, "b": entry.b, "reason": entry.reason}
            for entry in comparison.one_sided
        ],
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        "environment": [
            {"fact": entry.fact, "a": list(entry.a), "b": list(entry.b)} for entry in comparison.differences()
        ],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "cell_id": row.cell.cell_id,
        "cell": row.cell.model_dump(),
        "measurement": row.measurement,
        "metric": row.metric,
        "verdict": row.verdict,
        "ratio": row.ratio,
        "ci_low": row.ci_low,
        "ci_high": row.ci_high,
        "tolerance": row.tolerance,
        "basis": row.basis,
        "a": row.a,
        "b": row.b,
        "runs_a": row.runs_a,
        "runs_b": row.runs_b,
        "samples_a": row.samples_a,
        "samples_b": row.samples_b,
    }


def _timed(side: Side) -> int:
    return sum(bool(entry.timings) for entry in side.entries.values())


def _common(comparison: Comparison) -> Mapping[str, AxisValue]:
    """The axes that have one value in all compared cells, which no table needs to repeat."""
    axes: dict[str, set[AxisValue]] = {}
    for row in comparison.rows:
        for name, value in row.cell.axes.items():
            axes.setdefault(name, set()).add(value)
    return {name: next(iter(values)) for name, values in axes.items() if len(values) == 1}


def _label(cell: Cell, common: Mapping[str, AxisValue]) -> str:
    axes = " ".join(f"{name}={value}" for name, value in cell.axes.items() if name not in common)
    return f"{cell.subject}/{cell.provider} {axes}"


def _worst(comparison: Comparison, verdict: str) -> list[Row]:
    """The rows of a verdict, the farthest from 1 first."""
    rows = [row for row in comparison.rows if row.verdict == verdict]
    return sorted(rows, key=lambda row: -max(row.ratio, 1 / row.ratio))


def _missing(one_sided: Sequence[OneSided]) -> Mapping[tuple[Status, Status, str], tuple[int, str]]:
    """Status on either side and provider, to how many cells and the first one's reason."""
    counted = Counter((entry.a, entry.b, entry.cell.provider) for entry in one_sided)
    reasons: dict[tuple[Status, Status, str], str] = {}
    for entry in one_sided:
        reasons.setdefault((entry.a, entry.b, entry.cell.provider), entry.reason)
    return {key: (count, reasons[key]) for key, count in counted.items()}
