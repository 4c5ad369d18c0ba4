"""The conclusions of document 002 as tests of a run's numbers: each has a rule, a ratio with its interval, a verdict.

Owns the rules and their limits, fixed before any number is looked at. The document's words, and ours, are in the
template; the arithmetic is in `document_gptq_numbers`, the rule for a single ratio in `verdicts`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smbench.analysis import Row
from smbench.document_gptq_cells import E2E, EXLLAMA, MARLIN, Cells, Sweep
from smbench.document_gptq_numbers import Interval, LogRatio, log_ratio, mean_ratio
from smbench.verdicts import judge

Verdict = Literal["confirmed", "refuted", "unclear", "not measurable here"]

ALMOST_THE_SAME = 0.05
"""Two engines are `almost the same speed` within this relative difference."""
ALMOST_NO_DIFFERENCE = 0.02
"""The same for two attention backends of one engine: what the published audit holds the document to."""
WORKS_WELL = 0.10
"""A kernel works well that is no slower than the fastest other one by more than this."""
ALL_BUT = 1
"""`Almost all` is all but so many."""
LARGE_CHUNK = 1024
"""From here on the document has Exllama working well."""
NOT_MUCH_BETTER = 0.80
"""A kernel that takes less than this share of another's time is much better."""
REALLY_FASTER = 0.05
"""An engine is really faster that is so by more than this."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Times of B over times of A."""

    a: str
    b: str
    ratio: Interval
    """Of several points, the geometric mean."""
    points: int
    lowest: tuple[str, float]
    """The point where the ratio is lowest, and the ratio."""
    highest: tuple[str, float]


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of the document, held against this run."""

    key: str
    verdict: Verdict
    evidence: Evidence | None
    reason: str | None = None
    """Why it cannot be measured here; None where it can."""
    well: int = 0
    """Of a claim about most points: how many clearly bear it out."""
    badly: int = 0
    """How many clearly do not."""
    growth: tuple[int, int, float] | None = None
    """Of a claim about chunk sizes: the largest and the smallest with a number, and the ratio of the latter's time."""


@dataclass(frozen=True)
class Claims:
    """The claims that one run can decide."""

    cells: Cells

    def about_engines(self) -> list[Claim]:
        """The four conclusions of the document's first part."""
        return [self.chunked(), self.marlin(), self.exllama(), self.attention()]

    def chunked(self) -> Claim:
        """With chunked prefill vLLM and sglang are almost the same speed: both run Marlin."""
        found = self._along_the_sweep({"vLLM with Marlin": self._marlin, "sglang": self.cells.role("sglang")})
        if isinstance(found, str):
            return Claim("chunked", "not measurable here", None, found)
        ratio = mean_ratio([entry for _, entry in found[2]])
        verdict, _ = judge(ratio.value, ratio.low, ratio.high, ratio.floor, ALMOST_THE_SAME)
        return Claim("chunked", _of_sameness(verdict), self._evidence(*found))

    def marlin(self) -> Claim:
        """Marlin works well at almost all chunk sizes: it is near the fastest other kernel of vLLM at all but one."""
        key = "marlin"
        sweep, marlin = self.cells.main, self._marlin
        if sweep is None or marlin is None:
            return Claim(key, "not measurable here", None, _absent(sweep, {"vLLM with Marlin": marlin}))
        table = self.cells.view.analysis.recipe.providers
        others = [name for name in sweep.providers if name != marlin and table[name].engine == table[marlin].engine]
        found, ahead = [], Counter[str]()
        for chunk in sweep.chunks:
            own, fastest = sweep.row(chunk, marlin), _fastest([sweep.row(chunk, name) for name in others])
            a, b = fastest.summary(E2E) if fastest else None, own.summary(E2E) if own else None
            if fastest and a and b:
                found.append((str(chunk), log_ratio(a, b)))
                ahead[self.cells.view.title(fastest.cell.provider)] += 1
        if not found:
            reason = self._why([*sweep.of(marlin), *(row for name in others for row in sweep.of(name))])
            return Claim(key, "not measurable here", None, reason or "no other kernel of vLLM is in this profile")
        limit = math.log1p(WORKS_WELL)
        badly = sum(ratio.low > limit for _, ratio in found)
        well = sum(ratio.high <= limit for _, ratio in found)
        verdict: Verdict = "unclear"
        if badly > ALL_BUT:
            verdict = "refuted"
        elif len(found) - well <= ALL_BUT:
            verdict = "confirmed"
        rival = f"the fastest other kernel ({', '.join(f'{title} at {count}' for title, count in ahead.items())})"
        evidence = self._evidence(rival, self.cells.view.title(marlin), found)
        return Claim(key, verdict, evidence, None, well, badly, _growth(sweep.of(marlin)))

    def exllama(self) -> Claim:
        """Exllama works well with large chunks, and is not much better than Marlin there."""
        key = "exllama"
        exllama = self.cells.role("vllm", EXLLAMA)
        found = self._along_the_sweep({"vLLM with Marlin": self._marlin, "vLLM with Exllama": exllama}, LARGE_CHUNK)
        if isinstance(found, str):
            return Claim(key, "not measurable here", None, found)
        ratio = mean_ratio([entry for _, entry in found[2]])
        low, high = math.log(NOT_MUCH_BETTER), math.log1p(WORKS_WELL)
        verdict: Verdict = "unclear"
        if low <= ratio.low and ratio.high <= high:
            verdict = "confirmed"
        elif ratio.high < low or ratio.low > high:
            verdict = "refuted"
        return Claim(key, verdict, self._evidence(*found))

    def attention(self) -> Claim:
        """There is almost no difference between flashinfer and flash attention when decoding."""
        rows = [row for row in self.cells.decoding if row.cell.axes["attention"] in ("flash-attention", "flashinfer")]
        pairs = []
        for row in rows:
            axes = {**row.cell.axes, "attention": "flashinfer"}
            other = self.cells.view.analysis.row(row.cell.subject, row.cell.provider, **axes)
            if row.cell.axes["attention"] == "flash-attention" and other:
                pairs.append((row, other))
        names = self.cells.names(row for row, _ in pairs)
        found = [
            (names[row.cell.cell_id], log_ratio(a, b))
            for row, other in pairs
            if (a := row.summary(E2E)) and (b := other.summary(E2E))
        ]
        if not found:
            reason = self._why(rows) or "this profile decodes with one attention backend only"
            return Claim("attention", "not measurable here", None, reason)
        ratio = mean_ratio([entry for _, entry in found])
        verdict, _ = judge(ratio.value, ratio.low, ratio.high, ratio.floor, ALMOST_NO_DIFFERENCE)
        return Claim("attention", _of_sameness(verdict), self._evidence("flash attention", "flashinfer", found))

    def decoding(self) -> Claim:
        """When decoding, sglang is really faster than vLLM in its fastest configuration."""
        table = self.cells.view.analysis.recipe.providers
        engines = {row.cell.cell_id: table[row.cell.provider].engine for row in self.cells.decoding}
        by_engine = {
            name: [row for row in self.cells.decoding if engines[row.cell.cell_id] == name]
            for name in ("vllm", "sglang")
        }
        vllm, sglang = (_fastest(rows) for rows in by_engine.values())
        a, b = (row.summary(E2E) if row else None for row in (vllm, sglang))
        if not (vllm and sglang and a and b):
            lacking = next(name for name, row in (("vllm", vllm), ("sglang", sglang)) if row is None)
            reason = self._why(by_engine[lacking]) or f"no cell of this profile has {TITLES[lacking]} decoding"
            return Claim("decoding", "not measurable here", None, reason)
        ratio = log_ratio(a, b)
        found, _ = judge(ratio.value, ratio.low, ratio.high, ratio.floor, REALLY_FASTER)
        names = self.cells.names([vllm, sglang])
        evidence = self._evidence(
            f"{names[vllm.cell.cell_id]}, the fastest of vLLM", names[sglang.cell.cell_id], [("decoding", ratio)]
        )
        verdict: Verdict = "confirmed" if found == "faster" else "unclear" if found == "unclear" else "refuted"
        return Claim("decoding", verdict, evidence)

    @property
    def _marlin(self) -> str | None:
        return self.cells.role("vllm", MARLIN)

    def _along_the_sweep(
        self, roles: Mapping[str, str | None], least_chunk: int = 1
    ) -> tuple[str, str, Sequence[tuple[str, LogRatio]]] | str:
        """Titles of A and B with the ratio at every chunk size where both have a number; why there is none."""
        sweep, (a, b) = self.cells.main, roles.values()
        if sweep is None or a is None or b is None:
            return _absent(sweep, roles)
        chunks = [chunk for chunk in sweep.chunks if chunk >= least_chunk]
        rows = [(chunk, sweep.row(chunk, a), sweep.row(chunk, b)) for chunk in chunks]
        found = [
            (str(chunk), log_ratio(first, second))
            for chunk, own, other in rows
            if own and other and (first := own.summary(E2E)) and (second := other.summary(E2E))
        ]
        if found:
            return self.cells.view.title(a), self.cells.view.title(b), found
        if not chunks:
            return f"no chunk of this profile has {least_chunk} tokens or more"
        return self._why([row for _, *pair in rows for row in pair if row]) or "no chunk size has numbers of both"

    def _evidence(self, a: str, b: str, found: Sequence[tuple[str, LogRatio]]) -> Evidence:
        ordered = sorted(found, key=lambda entry: entry[1].value)
        ends = [(name, math.exp(ratio.value)) for name, ratio in (ordered[0], ordered[-1])]
        return Evidence(a, b, mean_ratio([ratio for _, ratio in found]).interval, len(found), ends[0], ends[1])

    def _why(self, rows: Sequence[Row]) -> str | None:
        """How the first cell without a number ended; None where all have one."""
        row = next((row for row in rows if not row.summaries), None)
        return f"{self.cells.view.title(row.cell.provider)}: {row.status}, {row.reason}" if row else None


TITLES = {"vllm": "vLLM", "sglang": "sglang"}
"""How sentences call the two engines."""

RULES: Mapping[str, float] = {
    "almost_the_same": ALMOST_THE_SAME,
    "almost_no_difference": ALMOST_NO_DIFFERENCE,
    "works_well": WORKS_WELL,
    "not_much_better": NOT_MUCH_BETTER,
    "really_faster": REALLY_FASTER,
}
"""The limits, for the report to print."""


def _of_sameness(verdict: str) -> Verdict:
    """What a verdict on two times says of a claim that they are the same."""
    return "confirmed" if verdict == "same" else "unclear" if verdict == "unclear" else "refuted"


def _absent(sweep: Sweep | None, roles: Mapping[str, str | None]) -> str:
    if sweep is None:
        return "this profile has no chunk sizes to compare"
    lacking = [what for what, provider in roles.items() if provider is None]
    return f"this profile does not run {' nor '.join(lacking)}"


def _growth(rows: Sequence[Row]) -> tuple[int, int, float] | None:
    """How a provider's time changes from its largest to its smallest chunk."""
    timed = [(int(row.cell.axes["chunk_tokens"]), summary.median) for row in rows if (summary := row.summary(E2E))]
    return (timed[0][0], timed[-1][0], timed[-1][1] / timed[0][1]) if len(timed) > 1 else None


def _fastest(rows: Sequence[Row | None]) -> Row | None:
    timed = [(summary.median, row) for row in rows if row and (summary := row.summary(E2E))]
    return min(timed, key=lambda entry: entry[0], default=(0.0, None))[1]
