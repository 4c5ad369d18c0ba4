"""What the report of profile `peers` of document 000's recipe claims: ours against other projects' tuned LoRA kernels.

Pure values from a View. Owns the families of points and the goals that they are held against; no words and no format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench import arch, resources
from smbench.analysis import Comparison, Row
from smbench.cell import AxisValue
from smbench.document_lora_defects import integer
from smbench.published import Published
from smbench.stats import Summary, geometric_mean
from smbench.views import Axes, Plot, View

METADATA = "lora_metadata"
HOST_MEASURE = "host"
"""The measure that can time what no graph holds."""
FASTEST = "fastest tuned peer"
LONG_BATCH = 8192
"""From so many tokens on a share of the byte bound is a goal."""
REACHED_BYTES_PER_S = 4.27e12
"""What a copy of large buffers reached on an NVIDIA H200 when the goals were set: the bandwidth that they mean. The
vendor's peak is reached by nothing."""
REACHED_ON = "NVIDIA H200"
MOST_SLOWER = 24
"""Points that the list of the clearly slower ones shows."""


@dataclass(frozen=True, slots=True)
class Family:
    """Points that are judged together, and what they are to reach."""

    name: str
    subjects: tuple[str, ...]
    keep: Callable[[Axes], bool]
    by: tuple[str, ...]
    """The axes of its table."""
    speedup: float | None = None
    """Geometric mean over the fastest tuned peer that is the goal, with no point clearly slower."""
    share: float | None = None
    """Part of the byte bound that is the goal from LONG_BATCH tokens on, at each point."""


def _whole_rank(axes: Axes) -> bool:
    rank = integer(axes, "rank")
    return rank & (rank - 1) == 0


def _linear(projection: bool, mixed: bool) -> Callable[[Axes], bool]:
    return lambda axes: (axes["projection"] != "square") == projection and (axes["prefill"] != "all") == mixed


def _one_call(axes: Axes, decode: bool) -> bool:
    return _linear(False, False)(axes) and _whole_rank(axes) and (axes["seq_len"] == 1) == decode


FAMILIES = (
    Family("decode, shrink", ("bgmv_shrink",), _whole_rank, ("batch", "rank"), 1.25),
    Family("decode, expand", ("bgmv_expand",), _whole_rank, ("batch", "rank"), 1.25),
    Family("decode, one call", ("lora_linear",), lambda axes: _one_call(axes, True), ("batch", "rank"), 1.6),
    Family("prefill, shrink", ("sgmv_shrink",), _whole_rank, ("seq_len", "rank"), 1.2, 0.75),
    Family("prefill, expand", ("sgmv_expand",), _whole_rank, ("seq_len", "rank"), 1.4, 0.75),
    Family("prefill, one call", ("lora_linear",), lambda axes: _one_call(axes, False), ("seq_len", "rank"), 1.6),
    Family(
        "fused slices, one call",
        ("lora_linear",),
        lambda axes: axes["projection"] != "square",
        ("projection", "seq_len", "batch", "rank"),
    ),
    Family(
        "prefill and decode mixed, one call",
        ("lora_linear",),
        lambda axes: axes["prefill"] != "all",
        ("prefill", "seq_len", "batch", "rank"),
    ),
    Family(
        "ranks that are no power of two",
        ("bgmv_shrink", "bgmv_expand", "sgmv_shrink", "sgmv_expand", "lora_linear"),
        lambda axes: not _whole_rank(axes),
        ("rank",),
    ),
)
"""In the order of the report. A prefill goal counts from 2048 tokens on, which all prefill points have."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One family in numbers."""

    family: Family
    points: int
    """Planned for ours."""
    against: Mapping[str, Comparison | None]
    """Ours against each tuned peer and the fastest of them, at each point."""
    share_of_peak: float | None
    """Geometric mean of least bytes at the card's peak bandwidth over our time."""
    long: int
    """Points from LONG_BATCH tokens on that have a share of what the card was seen to reach."""
    long_share: float | None
    """Geometric mean of that share over these points."""
    long_lowest: float | None
    peer_long_share: float | None
    """The same mean for the fastest tuned peer of each of these points: what it leaves is all that could be gained."""
    over_sum: float | None
    """Of one call: geometric mean of the fastest tuned shrink's and the fastest tuned expand's time, each timed alone
    and of whichever peer, over our time."""

    @property
    def overall(self) -> Comparison | None:
        """Against the fastest tuned peer."""
        return self.against.get(FASTEST)

    @property
    def speedup_reached(self) -> bool | None:
        """Whether the mean is at the goal and no point is clearly slower; None without a goal or a number.

        One call has to reach it against the peers' one call and against the sum of their kernels.
        """
        if self.family.speedup is None or self.overall is None:
            return None
        means = [self.overall.geomean_speedup, *([self.over_sum] if self.over_sum else [])]
        return min(means) >= self.family.speedup and self.overall.slower == 0

    @property
    def share_reached(self) -> bool | None:
        """Whether every long batch is at the goal; None without a goal or a number."""
        if self.family.share is None or self.long_lowest is None:
            return None
        return self.long_lowest >= self.family.share


@dataclass(frozen=True, slots=True)
class Slower:
    """A point at which a tuned peer is clearly faster."""

    subject: str
    point: Axes
    ours: Summary
    peer: str
    theirs: Summary


@dataclass(frozen=True, slots=True)
class Group:
    """A line of a family's table."""

    at: Axes
    points: int
    against: Mapping[str, Comparison | None]


@dataclass(frozen=True)
class Peers:
    """A run of the profile, asked for what its report claims."""

    view: View
    published: Published | None = None

    @property
    def ours(self) -> str | None:
        """Our tuned kernels, or our default ones where only these have numbers."""
        return self.view.best

    @cached_property
    def opponents(self) -> list[str]:
        """Other projects' kernels with parameters that were searched for each point."""
        return self.view.of_selection("library-tuned")

    @cached_property
    def columns(self) -> Mapping[str, Sequence[str]]:
        """What ours is compared with: each tuned peer, and the fastest of them at each point."""
        single = {self.view.title(name): [name] for name in self.opponents}
        return {**single, FASTEST: self.opponents} if self.opponents else {}

    @property
    def long_batch(self) -> int:
        """Tokens from which on a share of the byte bound is judged."""
        return LONG_BATCH

    @property
    def reached(self) -> float:
        """The bandwidth in B/s that this share is of."""
        return REACHED_BYTES_PER_S

    @property
    def reached_on(self) -> str:
        """The card that reached it."""
        return REACHED_ON

    def rows(self, family: Family, provider: str | None) -> list[Row]:
        """A provider's rows of a family, in plan order."""
        if provider is None:
            return []
        return [row for subject in family.subjects for row in self.view.rows(provider, subject, family.keep)]

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Every family that the plan has points of."""
        return [self._verdict(family) for family in FAMILIES if self.rows(family, self.ours)]

    def _verdict(self, family: Family) -> Verdict:
        rows, measure = self.rows(family, self.ours), self.view.headline.name
        peak = [share for row in rows if (share := self._share(row, None)) is not None]
        device = self.view.analysis.device
        reached = REACHED_BYTES_PER_S if device and device.name == REACHED_ON else None
        long_rows = [row for row in rows if tokens(row.cell.axes) >= LONG_BATCH and reached]
        long = [share for row in long_rows if (share := self._share(row, reached)) is not None]
        theirs = [share for row in long_rows if (share := self._peer_share(row, reached)) is not None]
        return Verdict(
            family,
            len(rows),
            {column: self.view.analysis.compare(rows, names, measure) for column, names in self.columns.items()},
            geometric_mean(peak) if peak else None,
            len(long),
            geometric_mean(long) if long else None,
            min(long, default=None),
            geometric_mean(theirs) if theirs else None,
            geometric_mean(sums) if (sums := [ratio for row in rows if (ratio := self._over_sum(row))]) else None,
        )

    def _over_sum(self, row: Row) -> float | None:
        """The fastest tuned shrink and expand alone over our one call; None where the point has no such operations."""
        axes, measure = row.cell.axes, self.view.headline.name
        if axes.get("projection") != "square" or axes.get("prefill") != "all":
            return None
        plain = {name: value for name, value in axes.items() if name not in ("projection", "prefill")}
        kernels = "bgmv" if axes["seq_len"] == 1 else "sgmv"
        alone = [
            [s.median for name in self.opponents if (s := self.view.summary(f"{kernels}_{part}", name, plain, measure))]
            for part in ("shrink", "expand")
        ]
        mine = row.summary(measure)
        return sum(min(times) for times in alone) / mine.median if mine and all(alone) else None

    def _share(self, row: Row, bytes_per_s: float | None) -> float | None:
        """Least time over our time: by the card's peak bandwidth, or by a given one."""
        summary, work = row.summary(self.view.headline.name), row.result.work if row.result else None
        if summary is None or work is None:
            return None
        least = work.bytes / bytes_per_s if bytes_per_s else self.view.memory_bound_s(row)
        return least / summary.median if least else None

    def _peer_share(self, row: Row, bytes_per_s: float | None) -> float | None:
        """The same of the fastest tuned peer, whatever it read and wrote: least time over its time."""
        axes, measure, mine = row.cell.axes, self.view.headline.name, self._share(row, bytes_per_s)
        ours = row.summary(measure)
        found = [s.median for name in self.opponents if (s := self.view.summary(row.cell.subject, name, axes, measure))]
        return mine * ours.median / min(found) if mine and ours and found else None

    def groups(self, family: Family) -> list[Group]:
        """The lines of a family's table."""
        found: dict[tuple[AxisValue, ...], list[Row]] = {}
        for row in self.rows(family, self.ours):
            found.setdefault(tuple(row.cell.axes[axis] for axis in family.by), []).append(row)
        measure = self.view.headline.name
        return [
            Group(
                dict(zip(family.by, key, strict=True)),
                len(rows),
                {column: self.view.analysis.compare(rows, names, measure) for column, names in self.columns.items()},
            )
            for key, rows in sorted(found.items(), key=lambda item: [(isinstance(v, str), v) for v in item[0]])
        ]

    @cached_property
    def slower(self) -> list[Slower]:
        """Every point at which the fastest tuned peer is clearly faster, the worst first."""
        found = []
        for family in FAMILIES:
            for row in self.rows(family, self.ours):
                other = self.view.analysis.fastest(row, self.opponents, self.view.headline.name)
                mine, theirs = (each.summary(self.view.headline.name) if each else None for each in (row, other))
                if other and mine and theirs and mine.ci_low > theirs.ci_high:
                    found.append(Slower(row.cell.subject, row.cell.axes, mine, other.cell.provider, theirs))
        return sorted(found, key=lambda one: one.theirs.median / one.ours.median)

    @property
    def most_slower(self) -> int:
        """How many of them the report lists."""
        return MOST_SLOWER

    def chosen(self, subject: str) -> list[Axes]:
        """The points of an operation that are measured with the libraries' own choices too."""
        chosen = self.view.of_selection("library")
        return [
            point
            for point in self.view.points(subject)
            if any(self.view.status(subject, provider, point) is not None for provider in chosen)
        ]

    def tuning(self) -> Mapping[str, Comparison]:
        """By provider: its tuned parameters against its own choice, over all points that have both."""
        pairs = [
            (self.view.tuned, self.view.default),
            *((name, name.removesuffix("-tuned")) for name in self.opponents),
        ]
        found: dict[str, Comparison] = {}
        for tuned, default in pairs:
            if tuned and default and default in self.view.providers:
                rows = [row for row in self.view.rows(tuned) if row.cell.subject != METADATA]
                comparison = self.view.analysis.compare(rows, default, self.view.headline.name)
                found |= {tuned: comparison} if comparison else {}
        return found

    @property
    def metadata(self) -> str:
        """The operation of what is done once per step."""
        return METADATA

    @property
    def metadata_providers(self) -> list[str]:
        """The providers that are planned for it."""
        return [name for name in self.view.providers if self.view.rows(name, METADATA)]

    @property
    def host_measure(self) -> str | None:
        """The measure that times it, where the profile has that."""
        names = [measure.name for measure in self.view.analysis.profile.measure]
        return HOST_MEASURE if HOST_MEASURE in names else None

    def archs(self) -> Mapping[str, list[str]]:
        """Every arch with the cards of it that this run has numbers of."""
        table = arch.load(resources.archs_file())
        names = [name for name in self.view.machines.gpu_names() if name] if self.view.timed else []
        cards = {name: table.device_named(name) for name in names}
        return {
            name: sorted(card for card, device in cards.items() if device and device.arch == name)
            for name in table.arch
            if table.arch[name].compute_capability is not None
        }

    def plots(self) -> list[Plot]:
        """One figure, where any family has a ratio."""
        if not any(verdict.overall for verdict in self.verdicts):
            return []
        subjects = tuple(dict.fromkeys(subject for family in FAMILIES for subject in family.subjects))
        return [Plot("peers", "tuned_peers.png", self.view.headline, subjects)]

    def draw(self, plot: Plot) -> bytes:
        """The PNG of that figure."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_lora_peers

        return figures_lora_peers.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """All medians with their intervals."""
        entries = [
            {
                "op": row.cell.subject,
                "provider": row.cell.provider,
                "axes": dict(row.cell.axes),
                "measure": measure,
                "median_s": summary.median,
                "ci_low_s": summary.ci_low,
                "ci_high_s": summary.ci_high,
                "samples": summary.n,
            }
            for row in self.view.analysis.rows
            for measure, summary in row.summaries.items()
        ]
        lines = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
        return {"medians.json": f"[\n{lines}\n]\n".encode()} if entries else {}


def tokens(axes: Axes) -> int:
    """Tokens of a point's batch."""
    batch, length = integer(axes, "batch"), integer(axes, "seq_len")
    if axes.get("prefill", "all") == "all":
        return batch * length
    long = 1 if axes["prefill"] == "one" else -(-batch // 2)
    return long * length + batch - long
