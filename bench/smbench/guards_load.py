"""Integrity checks of batches and of load: what clocks and counts of one cell must agree on among themselves.

Owns what follows from the definitions of latencies, rates and loads, whatever engine or client made the numbers. What
an engine itself must have done (tokens, prefix caches, kernels) is in `guards_engine`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from smbench.findings import Evidence, Finding
from smbench.result import Batch, Load, Result, Serving

CLOCK_SLACK = 0.02
"""Relative distance that two readings of the same span may have: parts of a batch are timed one after the other, and
what lies between two parts is in the whole alone."""
CLOCK_SLACK_S = 2e-3
"""The same in seconds, for spans so short that a scheduler's tick is more than the share above."""
RATE_DEVIATIONS = 4.0
"""Standard deviations of a Poisson process that arrivals may be ahead of their rate: 3 in 100,000 runs are."""
KEPT_UP = 0.95
"""A system keeps up with a rate when it completes this share of what is asked a second while requests arrive."""
REPRESENTATIVE = 1.2
"""Mean over median step above which the median step is not what a batch is made of."""
PIECES = 1.05
"""Tokens that come in one piece of a stream, on average, above which the gaps between pieces are no token's latency."""


BURST_S = 50e-6
"""Between two tokens of one sequence lies a step of the engine, and launching its kernels alone takes longer."""
BURSTS = 0.1
"""Share of gaps below that from which on tokens are said to have come in bursts."""


def batch_clocks(evidence: Evidence) -> Iterator[Finding]:
    """The first tokens and the steps after them make up a batch, and there is a step for each further token."""
    for result, serving in _measured(evidence):
        for batch in serving.batches:
            if fault := _batch_fault(result, serving, batch):
                yield Finding(
                    "batch_clocks",
                    "refuted",
                    f"{result.cell.label()}: batch {batch.batch}: {fault}",
                    "prefill and decoding were not told apart as defined: look at the driver's clock",
                    result.cell_id,
                )
                break
    yield from _unrepresentative(evidence)


def load_clocks(evidence: Evidence) -> Iterator[Finding]:
    """Of a request, first token and further tokens make up the whole; no request outlasts the load."""
    for result, load in _loads(evidence):
        output = int(result.cell.axes["output_len"])
        for fault in (_lengths(load), _sums(load, output), _longest(load)):
            if fault:
                yield Finding(
                    "load_clocks",
                    "refuted",
                    f"{result.cell.label()}: {fault}",
                    "the client's numbers contradict each other: read its own file in native/",
                    result.cell_id,
                )
    yield from _pieces(evidence)
    yield from _bursts(evidence)


def little(evidence: Evidence) -> Iterator[Finding]:
    """By Little's law the mean number of requests in flight is throughput times latency: never above the limit."""
    for result, load in _loads(evidence):
        limit = load.max_concurrency
        if not limit or not load.completed or not load.duration_s:
            continue
        in_flight = concurrency(load)
        if in_flight > limit * (1 + CLOCK_SLACK):
            yield Finding(
                "little",
                "refuted",
                f"{result.cell.label()}: {load.completed / load.duration_s:.4g} requests/s × "
                f"{_mean(load.e2e_s):.4g} s = {in_flight:.4g} requests in flight, and {limit} were allowed",
                "the client kept more requests open than asked, or its clocks are wrong",
                result.cell_id,
            )


def rates(evidence: Evidence) -> Iterator[Finding]:
    """Requests were sent at the rate that was asked; where the engine falls behind it, that is said."""
    behind: dict[str, list[str]] = {}
    for result, load in _loads(evidence):
        rate = load.request_rate
        if rate is None or load.completed < 2:
            continue
        gaps = load.completed - 1
        # the last request is sent before it is answered, so the load lasts at least as long as the arrivals
        least_s = gaps / rate * (1 - RATE_DEVIATIONS / math.sqrt(gaps))
        if load.duration_s < least_s:
            yield Finding(
                "rates",
                "refuted",
                f"{result.cell.label()}: {load.completed} requests in {load.duration_s:.4g} s, and at {rate:g} a "
                f"second they cannot have arrived in less than {least_s:.4g} s",
                "the client sent faster than asked: the latencies are those of another load",
                result.cell_id,
            )
        elif (found := kept_up(load)) is not None and not found:
            behind.setdefault(result.cell.provider, []).append(f"{rate:g}/s")
    for provider, asked in behind.items():
        yield Finding(
            "rates",
            "note",
            f"{provider} does not keep up with {', '.join(dict.fromkeys(asked))}: requests queue for as long as the "
            "load lasts, so latencies there grow with the number of prompts",
            "read its throughput at these rates as its capacity, and no latency",
        )


def concurrency(load: Load) -> float:
    """Mean number of requests in flight: the time that all completed ones took together, over the load's duration."""
    return sum(load.e2e_s) / load.duration_s


def kept_up(load: Load) -> bool | None:
    """Whether requests were completed as fast as they arrived; None where they all came at once.

    The load lasts until the last answer, so one median latency after the last arrival is allowed.
    """
    rate = load.request_rate
    if rate is None or load.completed < 2:
        return None
    allowed_s = (load.completed - 1) / rate + sorted(load.e2e_s)[len(load.e2e_s) // 2]
    return load.duration_s * KEPT_UP <= allowed_s


def _measured(evidence: Evidence) -> Iterator[tuple[Result, Serving]]:
    for result in evidence.results:
        if result.serving is not None and result.status in ("ok", "verified"):
            yield result, result.serving


def _loads(evidence: Evidence) -> Iterator[tuple[Result, Load]]:
    for result, serving in _measured(evidence):
        if serving.load is not None:
            yield result, serving.load


def _batch_fault(result: Result, serving: Serving, batch: Batch) -> str | None:
    """What of a batch's clocks contradicts the definition; None for one whose engine shows no steps."""
    output = result.cell.axes.get("output_len")
    if batch.prefill_s is None or result.cell.subject != "static_batch":
        return None
    if serving.step_clock in ("engine-step", "stream") and len(batch.step_s) != int(output or 1) - 1:
        return (
            f"{len(batch.step_s)} decode steps, and {output} output tokens are one prefill and {int(output or 1) - 1}"
        )
    parts = batch.prefill_s + sum(batch.step_s)
    if parts > batch.e2e_s + _slack(batch.e2e_s):
        return f"prefill and steps take {parts:.6g} s, and the whole batch {batch.e2e_s:.6g} s"
    if batch.step_s and parts < batch.e2e_s - _slack(batch.e2e_s):
        return f"prefill and steps take {parts:.6g} s of a whole batch of {batch.e2e_s:.6g} s: something is in no part"
    return None


def _unrepresentative(evidence: Evidence) -> Iterator[Finding]:
    """Cells whose median step, times the number of steps, is not their decoding time."""
    found: dict[str, list[float]] = {}
    total: dict[str, int] = {}
    for result, serving in _measured(evidence):
        ratios = [_mean(b.step_s) / median for b in serving.batches if (median := _median(b.step_s))]
        if ratios:
            total[result.cell.provider] = total.get(result.cell.provider, 0) + 1
            if max(ratios) > REPRESENTATIVE:
                found.setdefault(result.cell.provider, []).append(max(ratios))
    for provider, ratios in found.items():
        yield Finding(
            "batch_clocks",
            "warning",
            f"{provider}: in {len(ratios)} of {total[provider]} cells the mean decode step is more than "
            f"{REPRESENTATIVE:g} times the median one, {max(ratios):.3g} times at worst",
            "the median step is not what a batch takes a step: read the total latency beside it",
        )


def _lengths(load: Load) -> str | None:
    """Every completed request has its latencies."""
    counts = {"TTFT": len(load.ttft_s), "TPOT": len(load.tpot_s), "E2E": len(load.e2e_s)}
    # no time per output token exists for a request of one token
    wrong = {
        name: count for name, count in counts.items() if count != load.completed and not (name == "TPOT" and not count)
    }
    if not wrong:
        return None
    return f"{load.completed} requests were completed, and there are " + ", ".join(
        f"{count} values of {name}" for name, count in wrong.items()
    )


def _sums(load: Load, output: int) -> str | None:
    """TTFT + (n - 1) · TPOT = E2E, summed over all requests: the order of two lists need not be the same."""
    if output < 2 or not load.tpot_s or _lengths(load):
        return None
    whole, parts = sum(load.e2e_s), sum(load.ttft_s) + (output - 1) * sum(load.tpot_s)
    if abs(whole - parts) <= _slack(whole):
        return None
    means = f"{parts / load.completed:.6g} s on average, and E2E {whole / load.completed:.6g} s"
    return f"TTFT + {output - 1} × TPOT is {means}"


def _longest(load: Load) -> str | None:
    if load.e2e_s and max(load.e2e_s) > load.duration_s + _slack(load.duration_s):
        return f"a request took {max(load.e2e_s):.6g} s, and the whole load {load.duration_s:.6g} s"
    return None


def _pieces(evidence: Evidence) -> Iterator[Finding]:
    """Engines that stream several tokens at a time: their gaps are not comparable with those of others."""
    found: dict[str, float] = {}
    for result, load in _loads(evidence):
        further = load.completion_tokens - load.completed
        if load.itl_s and further / len(load.itl_s) > PIECES:
            found[result.cell.provider] = max(found.get(result.cell.provider, 0.0), further / len(load.itl_s))
    for provider, tokens in found.items():
        yield Finding(
            "load_clocks",
            "note",
            f"{provider} streams up to {tokens:.3g} tokens a piece on average, and ITL is the gap between two pieces",
            "compare TPOT, which counts tokens, and not ITL",
        )


def _bursts(evidence: Evidence) -> Iterator[Finding]:
    """Clients that saw tokens together though they were made one after the other."""
    found: dict[str, list[float]] = {}
    total: Counter[str] = Counter()
    for result, load in _loads(evidence):
        total[result.cell.provider] += 1
        share = sum(gap < BURST_S for gap in load.itl_s) / len(load.itl_s) if load.itl_s else 0.0
        if share > BURSTS:
            found.setdefault(result.cell.provider, []).append(share)
    for provider, shares in found.items():
        yield Finding(
            "load_clocks",
            "warning",
            f"{provider}: in {len(shares)} of {total[provider]} loads more than {BURSTS:.0%} of the gaps between "
            f"tokens are below {BURST_S * 1e6:.0f} µs, {max(shares):.0%} at worst, which no step of an engine is: "
            "server or client handed on several tokens at once",
            "TTFT is too long there and TPOT and ITL too short: read E2E latency and throughput, and give server and "
            "client cores of their own",
        )


def _slack(seconds: float) -> float:
    return max(CLOCK_SLACK * seconds, CLOCK_SLACK_S)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return 0.0
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
