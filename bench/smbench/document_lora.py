"""What the report of document 000 says beyond tables of times: summaries over groups, and the published numbers.

Pure values from a View and the published numbers. Owns no words and no format: those are in the template.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from smbench import records
from smbench.analysis import Comparison
from smbench.cell import AxisValue
from smbench.document_lora_defects import Counted, Defects, integer
from smbench.published import Published
from smbench.recipe import MeasureRow
from smbench.stats import geometric_mean
from smbench.views import Axes, Plot, Versus, View

SPLIT_HIDDEN_SIZE = 10240
"""The document stops at this size for sgmv, and its ratios differ below and above it."""
FASTEST = "fastest peer"


@dataclass(frozen=True, slots=True)
class Halves:
    """A line of the table of small and large hidden sizes."""

    provider: str
    subject: str
    sizes: str
    """`small` or `large`, by SPLIT_HIDDEN_SIZE."""
    line: Versus


@dataclass(frozen=True, slots=True)
class PublishedHalf:
    """A line of the published numbers alone, at small or large hidden sizes."""

    config: str
    subject: str
    sizes: str
    points: int
    ratios: Mapping[str, tuple[int, float] | None]
    """By peer: number of points, time of the peer over time of the document's kernel."""


@dataclass(frozen=True, slots=True)
class PublishedRatio:
    """Geometric means over one group of points: on the published card, and the same ratio of roles here."""

    group: Axes
    config: str
    there: Mapping[str, tuple[int, float] | None]
    """By published peer: number of points, time of the peer over time of the document's kernel."""
    here: Mapping[str, Comparison | None]
    """By peer of this run, at the same points."""


@dataclass(frozen=True)
class Lora:
    """A run of the recipe of document 000, asked for what its report claims."""

    view: View
    published: Published | None

    @property
    def split(self) -> int:
        """The hidden size that separates small from large."""
        return SPLIT_HIDDEN_SIZE

    def written_in(self, provider: str) -> list[str]:
        """The languages of the kernels that one of ours ran with: a configuration of CUDA C++ names its kernel."""
        rows = self.view.analysis.rows
        ran = [row.result.selection for row in rows if row.cell.provider == provider and row.result]
        return sorted({"CUDA C++" if "KERNEL" in found.config else "Triton" for found in ran if found}) or ["Triton"]

    @property
    def defects(self) -> Defects:
        """The evidence that the document's defects are not this run's."""
        return Defects(self.view)

    @property
    def fastest(self) -> str:
        """The column that compares with the fastest of several peers."""
        return FASTEST

    def sizes(self, subject: str) -> list[str]:
        """Which of `small` and `large` hidden sizes an operation has."""
        points = self.view.points(subject)
        return [sizes for sizes in ("small", "large") if any(_is(sizes, point) for point in points)]

    @property
    def families(self) -> Mapping[str, list[str]]:
        """`bgmv` and `sgmv`, each with its operations in the plan."""
        found: dict[str, list[str]] = {}
        for subject in self.view.analysis.subjects():
            found.setdefault(subject.partition("_")[0], []).append(subject)
        return found

    @cached_property
    def columns(self) -> Mapping[str, Sequence[str]]:
        """What a summary compares with: each peer, the fastest of them, and our default configuration."""
        peers = {self.view.title(name): [name] for name in self.view.peers}
        fastest = {FASTEST: self.view.peers} if len(self.view.peers) > 1 else {}
        default = self.view.default
        own = {self.view.title(default): [default]} if default and default != self.view.best else {}
        return {**peers, **fastest, **own}

    def overall(self, measure: str) -> Mapping[str, Versus]:
        """One line for each operation: our best against each column over all its points."""
        best = self.view.best
        if best is None:
            return {}
        lines = {
            subject: self.view.versus(best, subject, measure, self.columns) for subject in self.view.analysis.subjects()
        }
        return {subject: found[0] for subject, found in lines.items() if found}

    def verdicts(self, measure: str) -> Mapping[str, Mapping[str, Comparison]]:
        """By operation: our best against the fastest peer and against our default, where there are numbers."""
        columns = [name for name, against in self.columns.items() if against in (self.view.peers, [self.view.default])]
        found = {
            subject: {column: c for column in columns if (c := line.comparisons[column])}
            for subject, line in self.overall(measure).items()
        }
        return {subject: comparisons for subject, comparisons in found.items() if comparisons}

    def by_batch(self, subject: str, measure: str) -> list[Versus]:
        """One line for each length and batch size."""
        best = self.view.best
        by = [axis for axis in self.view.varying(subject) if axis != "hidden_size"]
        return self.view.versus(best, subject, measure, self.columns, by) if best else []

    def halves(self, measure: str) -> list[Halves]:
        """Our default and tuned configurations at hidden sizes up to the split and above it, where there are any."""
        return [
            Halves(provider, subject, sizes, line)
            for subject in self.view.analysis.subjects()
            for provider in (self.view.default, self.view.tuned)
            if provider
            for sizes in ("small", "large")
            for line in self._half(provider, subject, sizes, measure)
            if any(line.comparisons.values())
        ]

    def _half(self, provider: str, subject: str, sizes: str, measure: str) -> list[Versus]:
        against = {column: [name for name in names if name != provider] for column, names in self.columns.items()}
        return self.view.versus(provider, subject, measure, against, (), partial(_is, sizes))

    def tuning(self, measure: str) -> Mapping[str, Comparison]:
        """By operation: the tuned configuration against the default one."""
        tuned, default = self.view.tuned, self.view.default
        if tuned is None or default is None:
            return {}
        found = {
            subject: self.view.analysis.compare(self.view.rows(tuned, subject), default, measure)
            for subject in self.view.analysis.subjects()
        }
        return {subject: comparison for subject, comparison in found.items() if comparison}

    @cached_property
    def warm_and_cold(self) -> tuple[MeasureRow, MeasureRow] | None:
        """The measures with a warm and with a cold L2, None where the profile does not have both."""
        measures = self.view.analysis.profile.measure
        warm = next((m for m in measures if m.l2 == "warm"), None)
        cold = next((m for m in measures if m.l2 == "cold"), None)
        return (warm, cold) if warm and cold else None

    def cold_over_warm(self, subject: str, provider: str, sizes: str | None = None) -> tuple[int, float] | None:
        """Points and geometric mean of cold over warm time, at small or large hidden sizes or all."""
        if self.warm_and_cold is None:
            return None
        warm, cold = self.warm_and_cold
        rows = self.view.rows(provider, subject, lambda axes: sizes is None or _is(sizes, axes))
        return self.view.analysis.measure_ratio(rows, cold.name, warm.name)

    @cached_property
    def published_measure(self) -> MeasureRow | None:
        """The measure that times as the published numbers were timed; no other may stand beside them."""
        if self.published is None:
            return None
        protocol = self.published.protocol
        return next(
            (
                measure
                for measure in self.view.analysis.profile.measure
                if measure.method == protocol.get("method") and measure.l2 == protocol.get("l2")
            ),
            None,
        )

    @cached_property
    def _published(self) -> Mapping[tuple[str, tuple[tuple[str, AxisValue], ...]], Mapping[tuple[str, str], float]]:
        """By operation and point, then by provider and configuration: seconds."""
        found: dict[tuple[str, tuple[tuple[str, AxisValue], ...]], dict[tuple[str, str], float]] = {}
        for point in self.published.points() if self.published else ():
            axes = {name: value for name, value in point.at.items() if name not in ("op", "provider", "config")}
            key = str(point.at["op"]), tuple(sorted(axes.items()))
            found.setdefault(key, {})[str(point.at["provider"]), str(point.at["config"])] = point.value
        return found

    @property
    def published_peers(self) -> list[str]:
        """The implementations that the document compared its kernels with."""
        return [name for name in (self.published.legend if self.published else ()) if name != "jee"]

    def published_seconds(self, subject: str, point: Axes, provider: str, config: str) -> float | None:
        """The published time at the very same point, None where there is none."""
        return self._published.get((subject, tuple(sorted(point.items()))), {}).get((provider, config))

    def published_configs(self, subject: str) -> list[str]:
        """The configurations of the document's kernel that were published for points of this run."""
        points = [self._published.get((subject, tuple(sorted(p.items()))), {}) for p in self.view.points(subject)]
        return [config for config in ("default", "tuned") if any(("jee", config) in point for point in points)]

    def published_points(self, subject: str) -> list[Axes]:
        """The telling points that have published numbers."""
        return [
            point
            for point in self.view.telling_points(subject)
            if (subject, tuple(sorted(point.items()))) in self._published
        ]

    def published_ratios(self, subject: str) -> list[PublishedRatio]:
        """By configuration, length and batch: how the peers' times related to ours there and relate here."""
        measure = self.published_measure
        by = [axis for axis in self.view.varying(subject) if axis != "hidden_size"]
        found = []
        for config in self.published_configs(subject) if measure else ():
            provider = self.view.tuned if config == "tuned" else self.view.default
            groups: dict[tuple[AxisValue, ...], list[Axes]] = {}
            for point in self.view.points(subject):
                if self.published_seconds(subject, point, "jee", config) is not None:
                    groups.setdefault(tuple(point[axis] for axis in by), []).append(point)
            for key, points in sorted(groups.items()):
                there = {peer: self._there(subject, points, peer, config) for peer in self.published_peers}
                here = self._here(subject, points, provider, measure) if measure else {}
                found.append(PublishedRatio(dict(zip(by, key, strict=True)), config, there, here))
        return found

    def published_halves(self) -> list[PublishedHalf]:
        """The published ratios at hidden sizes up to the split and above it, for the operations of this run."""
        found = []
        for config, subject, sizes in itertools.product(
            ("default", "tuned"), self.view.analysis.subjects(), ("small", "large")
        ):
            points = [
                dict(axes)
                for (name, axes), times in self._published.items()
                if name == subject and ("jee", config) in times and _is(sizes, dict(axes))
            ]
            if points:
                ratios = {peer: self._there(subject, points, peer, config) for peer in self.published_peers}
                found.append(PublishedHalf(config, subject, sizes, len(points), ratios))
        return found

    def _there(self, subject: str, points: Sequence[Axes], peer: str, config: str) -> tuple[int, float] | None:
        pairs = [
            (
                self.published_seconds(subject, point, peer, config),
                self.published_seconds(subject, point, "jee", config),
            )
            for point in points
        ]
        ratios = [theirs / ours for theirs, ours in pairs if theirs and ours]
        return (len(ratios), geometric_mean(ratios)) if ratios else None

    def _here(
        self, subject: str, points: Sequence[Axes], provider: str | None, measure: MeasureRow
    ) -> Mapping[str, Comparison | None]:
        found = [self.view.analysis.row(subject, provider, **point) for point in points] if provider else []
        rows = [row for row in found if row]
        return {peer: self.view.analysis.compare(rows, peer, measure.name) for peer in self.view.peers}

    def published_slower(self) -> Counted:
        """Of the published shrink points that have both: those where the document's kernel is slower when tuned."""
        pairs = [
            (times["jee", "tuned"], times["jee", "default"])
            for (subject, _), times in self._published.items()
            if subject.endswith("_shrink") and {("jee", "tuned"), ("jee", "default")} <= times.keys()
        ]
        return Counted(sum(tuned > default for tuned, default in pairs), len(pairs))

    def plots(self) -> list[Plot]:
        """The figures of the report."""
        measure = self.published_measure
        beside = [
            Plot("published", f"{subject}_published.png", measure, (subject,))
            for subject in self.view.analysis.subjects()
            if measure
            and self.published_configs(subject)
            and any(row.summary(measure.name) for p in self.view.providers for row in self.view.rows(p, subject))
        ]
        return [*self.view.plots(), *beside]

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of `plots`."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_lora

        return figures_lora.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """The document's record files, by name."""
        return {name: records.dump(series) for name, series in records.records(self.view.analysis).items()}


def _is(sizes: str, axes: Axes) -> bool:
    """Whether a point's hidden size is `small` or `large`."""
    return (integer(axes, "hidden_size") <= SPLIT_HIDDEN_SIZE) == (sizes == "small")
