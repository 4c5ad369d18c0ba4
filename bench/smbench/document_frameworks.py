"""What the report of document 004 shows: its tables, listings, glossary, figures and conclusions. Pure values.

Owns which of its parts a run can show, and the figures' list. The parts themselves are in the modules beside it, words
and formats in the template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench import document_frameworks_load as loads
from smbench import document_frameworks_static as static
from smbench.analysis import Row
from smbench.document_engines import Engines
from smbench.document_frameworks_cells import ONLINE, STATIC, Cells, Group, serving_of
from smbench.document_frameworks_commands import PORT, QuickStart, quick_starts
from smbench.document_frameworks_conclusions import (
    Capacity,
    Front,
    Ranking,
    Scaling,
    capacities,
    fronts,
    rankings,
    scalings,
)
from smbench.document_frameworks_glossary import Entry, entries
from smbench.document_frameworks_load import LIMITS, Limits, Offline, Online
from smbench.document_frameworks_published import Document004
from smbench.document_frameworks_settings import Quantity, quantities
from smbench.document_frameworks_static import Case, Worked
from smbench.document_frameworks_table import Point, of_case, of_offline, of_online, points
from smbench.enginerules import ENGINES
from smbench.metricnames import TOOLS, Tool
from smbench.metrics import STATISTICS, Statistic
from smbench.published import Published
from smbench.result import Kernel, Trace
from smbench.statements import Grouped
from smbench.views import Plot, View, slug

STATIC_LATENCIES = ("prefill_latency", "decode_latency", "e2e_latency")


@dataclass(frozen=True, slots=True)
class Offer:
    """What an engine offers of what is asked here, as the rules have it."""

    provider: str
    engine: str
    devices: Sequence[str]
    dtypes: Sequence[str]
    graphs: Sequence[str]
    workloads: Sequence[str]
    parallel: bool
    step_clock: str | None
    """How decode steps of its batches were seen; None where none was."""
    told_cache: bool
    """Whether it says how many prompt tokens came from a cache."""


SHOWN_KERNELS = 10
"""Of a trace; the record has more."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A profiled cell."""

    row: Row
    trace: Trace

    @property
    def kernels(self) -> Sequence[Kernel]:
        """The longest ones."""
        return self.trace.kernels[:SHOWN_KERNELS]


class Frameworks:
    """A run of the recipe of document 004, asked for what its report says."""

    def __init__(self, view: View, published: Published | None) -> None:
        self._view = view
        self._published = published
        self.cells = Cells(view)
        self.engines = Engines(view)

    @property
    def view(self) -> View:
        """The run."""
        return self._view

    @property
    def published(self) -> Published | None:
        """The document's own numbers, where the recipe names them."""
        return self._published

    @property
    def warmup(self) -> int:
        """Repetitions of a batch that are not counted."""
        return self._view.analysis.profile.measure[0].warmup

    @property
    def samples(self) -> int:
        """Repetitions of a batch that are counted."""
        return self._view.analysis.profile.measure[0].samples

    @property
    def limits(self) -> Sequence[Limits]:
        """What goodput is stated against."""
        return LIMITS

    @property
    def port(self) -> int:
        """What stands for the free port that a server of a run takes."""
        return PORT

    @property
    def printed_steps(self) -> int:
        """Decode steps that a listing shows."""
        return static.PRINTED_STEPS

    @cached_property
    def quick_starts(self) -> Sequence[QuickStart]:
        """How each engine's server was started and loaded."""
        return quick_starts(self._view)

    @cached_property
    def quantities(self) -> Sequence[Quantity]:
        """Settings side by side."""
        return quantities(self._view, self._view.analysis.rows)

    @cached_property
    def document(self) -> Document004 | None:
        """The document's own numbers with what the audit says of them."""
        return Document004(self._published) if self._published else None

    def missing(self, rows: Iterable[Row]) -> list[Grouped]:
        """Why numbers are missing from a table of these cells; keys are provider and status."""
        return self.cells.missing(rows)

    def offers(self) -> list[Offer]:
        """What the engines of the profile offer."""
        table = self._view.analysis.recipe.providers
        found = []
        for provider in self._view.providers:
            rules = ENGINES.get(table[provider].engine or "")
            if rules is None:
                continue
            served = [s for row in self._view.rows(provider) if (s := serving_of(row))]
            clocks = list(dict.fromkeys(s.step_clock for s in served if s.step_clock not in (None, "none")))
            found.append(
                Offer(
                    provider,
                    str(table[provider].engine),
                    list(rules.graphs),
                    rules.plain_dtypes,
                    list(dict.fromkeys(word for words in rules.graphs.values() for word in words)),
                    [name for name in rules.workloads if name in self.cells.subjects],
                    any(rules.parallel.values()),
                    clocks[0] if clocks else None,
                    any(batch.cached_tokens is not None for s in served for batch in s.batches),
                )
            )
        return found

    # ------------------------------------------------------------------------------------------------ static batches

    def cases(self, group: Group) -> list[Case]:
        """The numbers of a static table: its points in order, the providers of a point side by side."""
        rows = (group.row(point, provider) for point in group.points for provider in group.providers)
        return [found for row in rows if row and (found := static.case(row))]

    @cached_property
    def example(self) -> Group | None:
        """The static table that the document's forms are shown of: with numbers, and the document's number of GPUs."""
        found = [group for group in self.cells.static if group.measured]
        theirs = self._published.at.get("tensor_parallel") if self._published else None
        alike = [group for group in found if group.setting["tensor_parallel"] == theirs]
        return next(iter(alike + found), None)

    def command(self, group: Group) -> str:
        """sglang's own program for the cases of a table."""
        return static.command(group)

    def result_files(self, group: Group) -> list[tuple[str, str]]:
        """The result file of each provider of a table, as the document prints it: objects over several lines."""
        found = []
        for provider in group.providers:
            lines = static.result_file(group.of(provider), self.warmup).decode().splitlines()
            text = "".join(json.dumps(json.loads(line), indent=3, separators=(",", ":")) for line in lines)
            if text:
                found.append((provider, text))
        return found

    def listings(self, group: Group) -> list[tuple[str, str]]:
        """What the terminal would show of each provider of a table."""
        found = [(provider, static.listing(group, provider, self.warmup)) for provider in group.providers]
        return [(provider, text) for provider, text in found if text]

    def worked(self) -> Worked | None:
        """The formulas with the numbers of a cell that has all of them."""
        rows = [row for group in self.cells.static for row in group.rows]
        found = [worked for row in rows if (worked := static.worked(row, self.warmup))]
        return max(found, key=lambda entry: (entry.median_step_s is not None, entry.output_len), default=None)

    # --------------------------------------------------------------------------------------------- offline and online

    def offline(self, group: Group) -> list[Offline]:
        """The numbers of an offline table."""
        rows = (group.row(point, provider) for point in group.points for provider in group.providers)
        return [found for row in rows if row and (found := loads.offline(row, self.warmup))]

    def online(self, group: Group) -> list[Online]:
        """The numbers of an online table."""
        rows = (group.row(point, provider) for point in group.points for provider in group.providers)
        return [found for row in rows if row and (found := loads.online(row))]

    def same_prompts(self, group: Group) -> list[Online]:
        """The loads of an online table that differ in rate and concurrency only: those of its first dataset."""
        found = self.online(group)
        first = [entry.row.cell.axes["dataset"] for entry in found][:1]
        return [entry for entry in found if [entry.row.cell.axes["dataset"]] == first]

    def offline_listing(self) -> str | None:
        """What the terminal would show of the first offline cell."""
        found = [entry for group in self.cells.offline for entry in self.offline(group)]
        return loads.offline_listing(found[0]) if found else None

    def serving_listings(self) -> list[tuple[Online, str]]:
        """What the terminal would show of each provider's load with most output tokens a second."""
        found = [capacity.best for group in self.cells.online for capacity in self.capacities(group)]
        return [(entry, loads.serving_listing(entry)) for entry in found]

    # ------------------------------------------------------------------------------------------------- across engines

    @cached_property
    def points(self) -> Sequence[Point]:
        """The table across engines: every point at which one of them has a number."""
        return points(
            [
                *(of_case(case) for group in self.cells.static for case in self.cases(group)),
                *(of_offline(entry) for group in self.cells.offline for entry in self.offline(group)),
                *(of_online(entry) for group in self.cells.online for entry in self.online(group)),
            ]
        )

    @property
    def compared(self) -> list[str]:
        """The providers that have any number."""
        return [name for name in self._view.providers if any(name in point.lines for point in self.points)]

    def traces(self) -> list[Traced]:
        """The cells that were profiled."""
        return [
            Traced(row, serving.trace)
            for row in self._view.analysis.rows
            if (serving := serving_of(row)) and serving.trace
        ]

    # --------------------------------------------------------------------------------------------------- conclusions

    def rankings(self, subject: str) -> list[Ranking]:
        """Who is fastest in a workload, by each of its latencies."""
        groups = [group for group in self.cells.groups if group.subject == subject]
        measures = {STATIC: STATIC_LATENCIES, ONLINE: ("ttft", "tpot", "e2e_latency")}
        return rankings(groups, measures.get(subject, ("e2e_latency",)))

    def scalings(self, axis: str) -> list[Scaling]:
        """How latencies of static batches change along an axis."""
        return scalings(self.cells.static, axis, STATIC_LATENCIES[:2])

    def capacities(self, group: Group) -> list[Capacity]:
        """What each server of a table reached."""
        return capacities(self.same_prompts(group))

    def fronts(self, group: Group, latency: str) -> list[Front]:
        """Each server's part in the Pareto front of a table."""
        return fronts(self.same_prompts(group), latency)

    def beside(self) -> bool:
        """Whether the document's numbers stand beside this run's: on cards, with cases in common."""
        if self.document is None or self._view.analysis.profile.device != "cuda":
            return False
        cases = [case for group in self.cells.static for case in self.cases(group)]
        return any((case.batch, case.input_len, case.output_len) in self.document.cases for case in cases)

    # ------------------------------------------------------------------------------------------------------- glossary

    def glossary(self) -> list[Entry]:
        """Every metric of the document's workloads: what ours counts, and what other tools call it."""
        return entries(self.cells.subjects)

    def statistics(self) -> Sequence[Statistic]:
        """How many values become one."""
        return STATISTICS

    def tools(self) -> Sequence[Tool]:
        """The tools of the map."""
        return list(TOOLS.values())

    # -------------------------------------------------------------------------------------------- figures and records

    def plots(self) -> list[Plot]:
        """The figures that the numbers allow."""
        head = self._view.headline
        found = [
            Plot("static", f"static_{i}.png", head, (str(i),))
            for i, group in enumerate(self.cells.static)
            if any(case.step for case in self.cases(group))
        ]
        return found + [
            Plot("pareto", f"pareto_{i}.png", head, (str(i),))
            for i, group in enumerate(self.cells.online)
            if self.same_prompts(group)
        ]

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of `plots`."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_frameworks

        return figures_frameworks.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """Result files and listings of static batches, statistics of loads, resolved settings; files by provider."""
        files: dict[str, bytes] = {}
        served = [entry for group in self.cells.online for entry in self.online(group)]
        for provider in self._view.providers:
            name = slug(provider)
            if lines := static.result_file(self._view.rows(provider, STATIC), self.warmup):
                files[f"bench_one_batch_{name}.jsonl"] = lines
                files[f"bench_one_batch_{name}.txt"] = self._listing_file(provider)
            if mine := [entry for entry in served if entry.row.cell.provider == provider]:
                files[f"serving_{name}.jsonl"] = loads.records(provider, mine)
        return {**files, **self.engines.settings_files()}

    def _listing_file(self, provider: str) -> bytes:
        """The listings of all static tables of a provider, each below its setting."""
        parts = [
            f"# {self.cells.words(group.setting)}\n{text}\n"
            for group in self.cells.static
            if (text := static.listing(group, provider, self.warmup))
        ]
        return "\n".join(parts).encode()
