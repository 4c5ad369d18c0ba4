"""Document 002 across cards: its claims on its own numbers, and every card's phases and rates side by side.

Pure values. Published numbers come without samples, so nothing here has an interval but what this run measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smbench.document_gptq_cells import Cells
from smbench.document_gptq_claims import (
    ALL_BUT,
    ALMOST_NO_DIFFERENCE,
    ALMOST_THE_SAME,
    LARGE_CHUNK,
    NOT_MUCH_BETTER,
    REALLY_FASTER,
    WORKS_WELL,
)
from smbench.document_gptq_numbers import Rate, decode_rate, prefill_rate, split
from smbench.document_gptq_published import EXLLAMA_LABEL, MARLIN_LABEL, SGLANG_LABEL, Card
from smbench.observations import Observation
from smbench.stats import geometric_mean

TOKENS_SHORT, TOKENS_LONG = 16, 512
"""Output tokens of the document's two kinds of requests."""
FIRST_CARD, SECOND_CARD = "NVIDIA GeForce RTX 4090", "NVIDIA L40"
"""The cards of the document's last claim."""


@dataclass(frozen=True, slots=True)
class Printed:
    """What a card's published numbers make of a claim."""

    key: str
    card: str
    ratio: float
    points: int
    holds: bool
    impossible: int
    """Numbers behind it that the audit refuted."""
    of: int


@dataclass(frozen=True, slots=True)
class TwoCards:
    """The claim that one card prefills slower and decodes alike."""

    prefill: float
    """Time of the first card over the second's, geometric mean over both Marlin columns of the prefill table."""
    decoding: float
    """The same for vLLM with flash attention."""
    by_arithmetic: float | None
    """What the peaks of the matrix units alone let one expect of prefills; None where one is unknown."""
    by_bandwidth: float | None
    """What the memory bandwidths alone let one expect of decoding; None where one is unknown."""
    impossible: int
    of: int


@dataclass(frozen=True, slots=True)
class Machine:
    """One engine on one card, its two requests taken apart."""

    card: str
    measured: bool
    engine: str
    short_s: float
    long_s: float
    prefill_s: float
    step_s: float
    prefill: Rate | None
    decode: Rate | None
    marks: tuple[int, ...] = ()


def printed(card: Card) -> list[Printed]:
    """The claims that a card's own numbers decide."""
    found: list[Printed | None] = [
        _ratio_claim(
            card, "chunked", _columns(card, MARLIN_LABEL, SGLANG_LABEL), 1 / (1 + ALMOST_THE_SAME), 1 + ALMOST_THE_SAME
        ),
        _marlin(card),
        _ratio_claim(
            card, "exllama", _columns(card, MARLIN_LABEL, EXLLAMA_LABEL, LARGE_CHUNK), NOT_MUCH_BETTER, 1 + WORKS_WELL
        ),
        _ratio_claim(
            card,
            "attention",
            _pair(card.method("flash attention"), card.method("flashinfer")),
            1 / (1 + ALMOST_NO_DIFFERENCE),
            1 + ALMOST_NO_DIFFERENCE,
        ),
        _ratio_claim(card, "decoding", _pair(_fastest_vllm(card), card.method("sglang")), 0.0, 1 / (1 + REALLY_FASTER)),
    ]
    return [entry for entry in found if entry]


def two_cards(cards: Sequence[Card]) -> TwoCards | None:
    """The claim about the two cards of the document; None where one of them is not among the files."""
    first = next((card for card in cards if card.name == FIRST_CARD), None)
    second = next((card for card in cards if card.name == SECOND_CARD), None)
    if first is None or second is None:
        return None
    prefill = [
        (first.sweep[key], second.sweep[key])
        for key in first.sweep
        if key in second.sweep and key[1] in (MARLIN_LABEL, SGLANG_LABEL)
    ]
    decoding = first.method("flash attention"), second.method("flash attention")
    if not prefill or decoding[0] is None or decoding[1] is None:
        return None
    used = [[a for a, _ in prefill] + [decoding[0]], [b for _, b in prefill] + [decoding[1]]]
    devices = first.device, second.device
    bandwidths = [device.memory_bandwidth_bytes_per_s if device else None for device in devices]
    peaks = [device.tensor_peak_flops_per_s(prefill[0][0].dtype) if device else None for device in devices]
    return TwoCards(
        geometric_mean([a.value / b.value for a, b in prefill]),
        decoding[0].value / decoding[1].value,
        peaks[1] / peaks[0] if peaks[0] and peaks[1] else None,
        bandwidths[1] / bandwidths[0] if bandwidths[0] and bandwidths[1] else None,
        first.refuted(used[0]) + second.refuted(used[1]),
        len(used[0]) + len(used[1]),
    )


def of_card(card: Card) -> list[Machine]:
    """vLLM and sglang on a published card; none where it lacks one of the two requests."""
    found = []
    for engine, column, words in (
        ("vLLM, Marlin, flash attention", MARLIN_LABEL, ("flash attention",)),
        ("sglang", SGLANG_LABEL, ("sglang",)),
    ):
        short, long = card.sweep.get((LARGE_CHUNK, column)), card.method(*words)
        if short and long:
            found.append(_published(card, engine, short, long))
    return found


def of_run(cells: Cells) -> list[Machine]:
    """Every provider of the run in its fastest decoding configuration that can be taken apart."""
    analysis = cells.view.analysis
    name = ", ".join(cells.view.machines.names()) or "an unknown device"
    found: dict[str, Machine] = {}
    titles = cells.names(cells.decoding)
    for row in cells.decoding:
        short = cells.partner(row)
        phases = split(short, row) if short else None
        a, b = (entry.summary("e2e_latency") if entry else None for entry in (short, row))
        if phases is None or a is None or b is None:
            continue
        machine = Machine(
            name,
            True,
            titles[row.cell.cell_id],
            a.median,
            b.median,
            phases.prefill.value,
            phases.step.value,
            prefill_rate(row, analysis.device),
            decode_rate(row, analysis.device),
        )
        best = found.get(row.cell.provider)
        if best is None or machine.long_s < best.long_s:
            found[row.cell.provider] = machine
    return list(found.values())


def _published(card: Card, engine: str, short: Observation, long: Observation) -> Machine:
    step_s = (long.value - short.value) / (TOKENS_LONG - TOKENS_SHORT)
    prefill_s = short.value - (TOKENS_SHORT - 1) * step_s
    work = {phase.name: phase for phase in long.work}
    peak = card.device.tensor_peak_flops_per_s(long.dtype) if card.device else None
    bandwidth = card.device.memory_bandwidth_bytes_per_s if card.device else None
    prefill, step = work.get("prefill"), work.get("decode step")
    marks = [mark.number for mark in card.marks if {short.label, long.label} & mark.about]
    return Machine(
        card.name,
        False,
        engine,
        short.value,
        long.value,
        prefill_s,
        step_s,
        Rate(prefill.flops / prefill_s, peak) if prefill else None,
        Rate(step.bytes / step_s, bandwidth) if step else None,
        tuple(marks),
    )


def _columns(card: Card, a: str, b: str, least_chunk: int = 1) -> list[tuple[Observation, Observation]]:
    return [
        (card.sweep[chunk, a], card.sweep[chunk, b])
        for chunk in card.chunks
        if chunk >= least_chunk and (chunk, a) in card.sweep and (chunk, b) in card.sweep
    ]


def _pair(a: Observation | None, b: Observation | None) -> list[tuple[Observation, Observation]]:
    return [(a, b)] if a and b else []


def _fastest_vllm(card: Card) -> Observation | None:
    found = [seen for label, seen in card.decoding.items() if label.startswith("vllm")]
    return min(found, key=lambda seen: seen.value, default=None)


def _ratio_claim(
    card: Card, key: str, pairs: Sequence[tuple[Observation, Observation]], low: float, high: float
) -> Printed | None:
    if not pairs:
        return None
    ratio = geometric_mean([b.value / a.value for a, b in pairs])
    used = [seen for pair in pairs for seen in pair]
    return Printed(key, card.name, ratio, len(pairs), low <= ratio <= high, card.refuted(used), len(used))


def _marlin(card: Card) -> Printed | None:
    pairs = _columns(card, EXLLAMA_LABEL, MARLIN_LABEL)
    if not pairs:
        return None
    badly = sum(b.value > (1 + WORKS_WELL) * a.value for a, b in pairs)
    used = [seen for pair in pairs for seen in pair]
    ratio = geometric_mean([b.value / a.value for a, b in pairs])
    return Printed("marlin", card.name, ratio, len(pairs), badly <= ALL_BUT, card.refuted(used), len(used))
