"""What the report of document 002 shows: its tables, its claims, its summary across cards. Pure values.

Owns which of its parts a run can show, and the figures' list. The parts themselves are in the modules beside it, words
and formats in the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench import arch, resources
from smbench.analysis import Row
from smbench.arch import Device
from smbench.document_engines import Engines
from smbench.document_gptq_cells import E2E, EXLLAMA, MACHETE, TPOT, TTFT, Cells, Sweep, measurement
from smbench.document_gptq_claims import RULES, Claim, Claims
from smbench.document_gptq_fit import DEQUANTIZES_ABOVE_ROWS, Fit, dequantizing_bytes, fit
from smbench.document_gptq_machines import Machine, Printed, TwoCards, of_card, of_run, printed, two_cards
from smbench.document_gptq_numbers import Rate, Split, decode_rate, prefill_rate, split
from smbench.document_gptq_published import EXLLAMA_LABEL, Card, cards
from smbench.published import Published
from smbench.statements import Grouped, grouped
from smbench.stats import Summary
from smbench.views import Plot, View

ONE_SHAPE = 0.01
"""Prefills of two models are of one size that differ by no more than this in their arithmetic."""


@dataclass(frozen=True, slots=True)
class Phases:
    """One configuration of a table, with what its time is made of."""

    name: str
    row: Row
    split: Split | None
    """None without a short request of the same settings."""
    prefill_rate: Rate | None
    decode_rate: Rate | None

    def summary(self, measure: str) -> Summary | None:
        """A measure of it."""
        return self.row.summary(measure)


@dataclass(frozen=True, slots=True)
class Headline:
    """A provider in four numbers; None where it has none."""

    provider: str
    largest: Summary | None
    """Short requests in the largest chunks of the sweep."""
    smallest: Summary | None
    long: Summary | None
    """Long requests, in the fastest configuration."""
    step: Summary | None
    """Time of each further token there."""


@dataclass(frozen=True, slots=True)
class Counted:
    """So many of so many."""

    count: int
    of: int


@dataclass(frozen=True, slots=True)
class OwnList:
    """What the document lists as not tested, and what of it this run has."""

    whole: Counted
    machete: Counted
    served: Counted


class Gptq:
    """A run of the recipe of document 002, asked for what its report says."""

    def __init__(self, view: View, *published: Published | None) -> None:
        """`published` are the document's files, a card each, in the order of the recipe."""
        self._view = view
        self._published = [entry for entry in published if entry is not None]
        self.cells = Cells(view)
        self.engines = Engines(view)
        self.claims = Claims(self.cells)

    @property
    def view(self) -> View:
        """The run."""
        return self._view

    @property
    def published(self) -> Published | None:
        """The first card of the document, where the recipe names one."""
        return next(iter(self._published), None)

    @property
    def device(self) -> Device | None:
        """The card's figures, None without a card or for an unknown one."""
        return self._view.analysis.device

    @property
    def rules(self) -> Mapping[str, float]:
        """The limits that verdicts are held to."""
        return RULES

    @cached_property
    def cards(self) -> Sequence[Card]:
        """The document's cards, with what the audit found."""
        names = {entry.device for entry in self._published}
        table = arch.load(resources.archs_file()) if names else None
        return cards(self._published, {name: table.device_named(name) if table else None for name in names})

    @cached_property
    def beside(self) -> Sequence[Card]:
        """The cards whose numbers stand beside this run's: those of the same lengths, beside a run on a card."""
        if self._view.analysis.profile.device != "cuda":
            return []
        lengths = {(int(r.cell.axes["input_len"]), int(r.cell.axes["output_len"])) for r in self._view.analysis.rows}
        return [
            card
            for card in self.cards
            if any((int(s.at["input_len"]), int(s.at["output_len"])) in lengths for s in card.dataset.observations)
        ]

    def rate_of_prefill(self, row: Row) -> Rate | None:
        """Arithmetic of a cell's prefill over its time."""
        return prefill_rate(row, self.device)

    def phases(self, rows: Sequence[Row]) -> list[Phases]:
        """The configurations of a table, each with its phases and rates; those that cannot run are left out."""
        rows = [row for row in rows if row.status not in ("unsupported", "skipped")]
        names = self.cells.names(rows)
        return [
            Phases(
                names[row.cell.cell_id],
                row,
                split(partner, row) if (partner := self.cells.partner(row)) and partner is not row else None,
                prefill_rate(row, self.device),
                decode_rate(row, self.device),
            )
            for row in rows
        ]

    def has(self, rows: Sequence[Row], measure: str = E2E) -> bool:
        """Whether any of the cells has a number."""
        return any(row.summary(measure) for row in rows)

    def sweep_rows(self, sweep: Sweep) -> list[Row]:
        """All cells of a sweep, in the order of its table."""
        return [row for chunk in sweep.chunks for name in sweep.providers if (row := sweep.row(chunk, name))]

    def headlines(self) -> list[Headline]:
        """The main numbers of every provider that has any: both ends of the sweep, and its fastest decoding."""
        found = [self._headline(provider) for provider in self._view.providers]
        return [entry for entry in found if entry.largest or entry.smallest or entry.long]

    def _headline(self, provider: str) -> Headline:
        sweep = self.cells.main
        ends = [sweep.row(chunk, provider) for chunk in (sweep.chunks[0], sweep.chunks[-1])] if sweep else [None, None]
        largest, smallest = (row.summary(E2E) if row else None for row in ends)
        rows = [row for row in self.cells.decoding if row.cell.provider == provider]
        timed = [(summary, row) for row in rows if (summary := row.summary(E2E))]
        long, row = min(timed, key=lambda entry: entry[0].median, default=(None, None))
        return Headline(provider, largest, smallest, long, row.summary(TPOT) if row else None)

    def missing(self, rows: Sequence[Row]) -> list[Grouped]:
        """Why numbers are missing from a table of these cells; keys are provider and status."""
        return grouped((row.cell.provider, row.status, row.reason or "") for row in rows if not row.summaries)

    def conclusions(self) -> list[Claim]:
        """The document's conclusions on engines."""
        return self.claims.about_engines()

    def printed(self, key: str) -> list[Printed]:
        """What the published numbers make of a claim, card by card."""
        return [entry for card in self.cards for entry in printed(card) if entry.key == key]

    def own_list(self) -> OwnList:
        """The document's own situations not tested, counted here."""
        table = self._view.analysis.recipe.providers
        rows = self._view.analysis.rows
        whole = [row for row in rows if row.cell.axes["scheduling"] == "whole"]
        machete = [row for row in rows if table[row.cell.provider].kernel == MACHETE]
        served = {row.cell.cell_id for row in rows if row.result and row.result.serving}
        wrong = {finding.cell_id for finding in self._view.analysis.findings if finding.guard == "tokens"}
        return OwnList(
            Counted(sum(bool(row.summaries) for row in whole), len(whole)),
            Counted(sum(bool(row.summaries) for row in machete), len(machete)),
            Counted(len(served - wrong), len(served)),
        )

    def two_cards(self) -> TwoCards | None:
        """The document's claim about its two cards."""
        return two_cards(self.cards)

    def machines(self) -> list[Machine]:
        """The summary across cards: the published ones, where they stand beside, and this run."""
        return [*(machine for card in self.beside for machine in of_card(card)), *of_run(self.cells)]

    @cached_property
    def fits(self) -> list[Fit]:
        """The cost of a chunk for the kernels of this run that dequantize."""
        table = self._view.analysis.recipe.providers
        found = []
        for sweep in self.cells.sweeps:
            traffic_s = self._traffic_s(self.device) if self._has_the_documents_shape(sweep) else None
            for name in sweep.providers:
                limit = DEQUANTIZES_ABOVE_ROWS.get(table[name].kernel or "")
                times = {
                    int(row.cell.axes["chunk_tokens"]): summary.median
                    for row in sweep.of(name)
                    if (summary := row.summary(E2E))
                }
                if limit is not None:
                    found.append(fit(f"{self._view.title(name)}, here", limit, sweep.input_len, times, traffic_s))
        return [entry for entry in found if entry]

    @cached_property
    def published_fits(self) -> list[Fit]:
        """The same for the document's Exllama columns."""
        limit = DEQUANTIZES_ABOVE_ROWS[EXLLAMA]
        found = [
            fit(
                f"{card.name}, published",
                limit,
                int(next(iter(card.sweep.values())).at["input_len"]),
                card.times(EXLLAMA_LABEL),
                self._traffic_s(card.device),
            )
            for card in self.beside
            if card.sweep
        ]
        return [entry for entry in found if entry]

    def _traffic_s(self, device: Device | None) -> float | None:
        """What dequantizing the document's model once takes a card by its bandwidth."""
        facts = self.published.numbers if self.published else {}
        bandwidth = device.memory_bandwidth_bytes_per_s if device else None
        if bandwidth is None or not {"weight_bytes", "linear_parameters"} <= facts.keys():
            return None
        return dequantizing_bytes(facts["weight_bytes"], facts["linear_parameters"]) / bandwidth

    def _has_the_documents_shape(self, sweep: Sweep) -> bool:
        """Whether the model of a sweep has the size of the document's, by the arithmetic of a prefill of one length."""
        ours = {found.work.flops for row in sweep.rows.values() if (found := measurement(row, TTFT)) and found.work}
        theirs = {
            phase.flops
            for card in self.cards
            for seen in card.sweep.values()
            for phase in seen.work
            if phase.name == "prefill" and seen.at["input_len"] == sweep.input_len
        }
        return bool(ours and theirs) and max(ours | theirs) <= (1 + ONE_SHAPE) * min(ours | theirs)

    def plots(self) -> list[Plot]:
        """The figures that the numbers allow."""
        head = self._view.headline
        found = [
            Plot("prefill", f"prefill_{i}.png", head, (str(i),))
            for i, sweep in enumerate(self.cells.sweeps)
            if self.has(self.sweep_rows(sweep))
        ]
        if self.has(self.cells.decoding):
            found.append(Plot("decoding", "decoding.png", head, ()))
        if self.fits:
            found.append(Plot("dequantize", "dequantize.png", head, ()))
        return found

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of `plots`."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_gptq

        return figures_gptq.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """Resolved settings of every provider, and the log of all requests."""
        return {**self.engines.settings_files(), **self.engines.request_log()}
