"""Which metrics exist. One row declares name, unit, direction and formula; nothing else may name a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A declared quantity. Storage is always in `unit`; a report may print it in another one."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    formula: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("duration", "s", "lower", "device time of one call: sample time / calls per sample; headline = median"),
        Metric("bandwidth", "B/s", "higher", "least bytes a call must move / duration"),
        Metric("throughput", "FLOP/s", "higher", "floating-point operations of the definition / duration"),
        Metric("roofline_fraction", "1", "higher", "max(bytes / peak bandwidth, FLOP / peak FLOP/s) / duration"),
        Metric("speedup", "1", "higher", "duration of the baseline provider / duration, same point, same measurement"),
    )
}
