"""Statistics under names such as `p99_ttft_ms`, which several tools write. Knows no tool."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from smbench.imported import Measure
from smbench.importing.content import Fields

_NAME = re.compile(r"(mean|median|std|min|max|p\d{1,2}(?:\.\d+)?)_(\w+)_ms")


def in_milliseconds(fields: Fields, names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """By metric, each statistic in seconds; `names` maps a tool's name, e.g. `e2el`, to the metric.

    A negative one is left out: sglang prints such a TPOT where a whole answer came in one chunk.
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in fields.values.items():
        match = _NAME.fullmatch(key)
        if match and match[2] in names and not (isinstance(value, float) and value < 0):
            found.setdefault(names[match[2]], {})[match[1]] = fields.number(key) / 1e3
    return found


def measures(
    definitions: Mapping[str, str],
    samples: Mapping[str, Sequence[float]],
    stated: Mapping[str, Mapping[str, float]],
) -> list[Measure]:
    """A measure for each metric of `definitions` that has samples or statistics."""
    return [
        Measure(
            metric=metric,
            definition=definition,
            samples=tuple(samples.get(metric, ())),
            stated=dict(stated.get(metric, {})),
        )
        for metric, definition in definitions.items()
        if samples.get(metric) or stated.get(metric)
    ]


def totals(fields: Fields, metrics: Mapping[str, tuple[str, str]]) -> list[Measure]:
    """A measure for each figure that is there: its key to metric and definition."""
    return [
        Measure(metric=metric, definition=definition, stated={"total": value})
        for key, (metric, definition) in metrics.items()
        if (value := fields.maybe_number(key)) is not None
    ]
